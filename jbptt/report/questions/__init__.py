"""The questions of the report, a room each: measured, drawn, said in words, tabulated."""
