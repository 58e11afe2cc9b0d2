"""One module a command, each a function of the command's name and arguments; they compose the rooms."""
