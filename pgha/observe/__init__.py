"""What is so: one task per source, each keeps one latest value, none raises; absence is a value too.

cluster.py         the store: watch, linearizable reads, generation, what is remembered of it
postgres.py        PostgreSQL: processes and probe
data_directory.py  what the data directory holds
peers.py           the other members, asked over REST while it is needed
"""
