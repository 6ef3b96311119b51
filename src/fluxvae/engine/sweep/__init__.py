"""One pass over the rows of a feature map: what it needs, how its blocks are fed, and how it runs."""
