# What the shell of `python -m tests.uml` reads at its start
PS1='uml:\w# '
