"""A plan as one HTML file: graph, memory, devices and times, for a browser.

The data is computed here (`document`, `tables`, `arena`); the files in
`assets` draw it. The page needs no network.

The design that lost: a drawing of the graph by a layout library. A layer of DeepSeek-V3 is a chain
of 25 steps with a few branches, so a list with lines beside it shows the same, is readable on a
phone and by a screen reader, and needs no library of 1.5 MB.
"""
