"""PostgreSQL, as mechanisms without opinion: how to do a thing, never whether or when.

    connection   SQL and replication commands on trio, with exact deadlines; DNS; "does it answer at all?"
    programs     running one of PostgreSQL's programs: deadline, cancellation, no secrets, last lines kept
    processes    postmaster.pid, the postmaster behind it, and every other process of the data directory
    server       start, stop, reload, promote, single-user recovery
    probe        the one monitoring query
    controldata  pg_controldata, and positions read from the WAL of a stopped server
    parameters   controlled settings, units, versions, what waits for a restart
    files        configuration and signal files      directories  clone swap, .failed, sizes, deletion
    histories    timeline history files and blocks   slots, roles  replication slots; users and grants, by SQL
    initdb basebackup pg_rewind   the three programs that write a data directory

Rules: nothing here blocks the loop (short local file operations excepted); every wait has a deadline; passwords travel
in files of mode 0600 or in SCRAM form, never in arguments.
"""
