"""The command line: ``kimi-audio NAME``, one module per command.

A module has ``add_arguments(parser)``, ``run(arguments)`` and, where arguments depend on each
other, ``check(parser, arguments)``. Only the standard library is imported before the arguments are
known to be good, so that ``--help`` and refusals take no time and need no installation.
"""
