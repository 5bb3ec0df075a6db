"""The small world: every sentence, question and dialogue that the miniature learns, by subjects."""
