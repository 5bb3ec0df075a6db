"""Ordinary English sentences for the figures of scripts/bench_adapters; none was trained on."""

SHORT = """\
The museum opens at ten, but the garden behind it is open all day.
Could you tell me which platform the train to Bristol leaves from?
She had never seen so many birds in one place before.
If the weather holds, we will walk along the river after lunch.
No, that is not what I meant!
My brother repaired the old radio with a piece of copper wire.
They bought apples, bread, a little cheese and two bottles of water.
Why did nobody tell us that the meeting had been moved?
The first snow of the winter fell quietly during the night.
Please leave your wet shoes by the door.
After forty years at sea, the captain could read the clouds like a book.
What a strange thing to say.
The results were better than expected; however, the experiment has to be repeated.
Nobody knows exactly how the fire started.
When the bell rang, the children ran out into the yard and began to shout.
It costs less than a cup of coffee.
He opened the letter slowly, read it twice, and put it back into the drawer without a word.
Turn left at the bridge and keep going until you see the church.
I would rather stay at home tonight.
The engine makes a low humming sound whenever it is cold outside.
Do you really think so?
A thin layer of dust covered the books that her grandfather had left behind in the attic.
Every answer was written down, counted and checked by two different people.
Good morning, how can I help you?
""".splitlines()
"""Sentences of 20 to 90 phonemes."""

_PARAGRAPHS = """\
The road climbed slowly out of the valley, passed three empty farms and a small stone chapel, and
then, without any warning, came to an end at the edge of a dark and silent lake.

Although the committee had promised to publish its report before the summer, the last chapter was
still missing in October, because two of its members could not agree on a single sentence.

She packed the blue dress, the heavy boots, a box of matches, two maps of the northern coast and
the letter from her sister, and then she sat down on the suitcase and waited for the taxi.

When you have mixed the flour with the butter and the sugar, add the eggs one after the other, stir
until the dough is smooth, and let it rest in a cool place for at least half an hour.

The old man who sold newspapers at the corner of our street, and who had been there every morning
since before I was born, told me once that he had never read a single one of them, because the
people who bought them always told him what was inside, and because, as he said with a smile, the
weather was something that he could see for himself.

If the pump stops while the machine is running, close the red valve first, wait until the pressure
has fallen below the mark, open the cover on the left side, remove the filter carefully, rinse it
under warm water until nothing dark comes out of it, and put everything back in the same order,
because otherwise the oil will run out over the floor.

In the spring of that year, when the river had carried away the wooden bridge and most of the lower
gardens, the people of the village met in the school, argued for three evenings about money, stone
and the best place to cross, and decided at last, by a majority of only two votes, to build the new
bridge exactly where the old one had been.

I remember the kitchen with its yellow curtains, the clock that was always ten minutes fast, the
smell of coffee and of wet coats in the winter, my grandmother, who could peel an apple in one long
ribbon without looking at it, and above all the radio on the shelf, which nobody was allowed to
touch, and which told us every evening what had happened in the world.
"""
LONG = [" ".join(text.split()) for text in _PARAGRAPHS.split("\n\n")]
"""Four sentences of 130 to 180 phonemes, then four of 260 to 330."""
