"""`pgha config sample`: a file to begin with. packaging/pgha.toml.example is the same text (a test keeps it so)."""

from __future__ import annotations

SAMPLE = """\
# pgha: one node of a cluster. Every node has such a file; what differs is marked (*).
# Check it:  pgha config check FILE       Start it:  pgha run FILE

scope = "demo"                  # the cluster's name
namespace = "service"           # keys in etcd: /service/demo/…
name = "node1"                  # (*) this node's name, unique in the cluster

[restapi]
listen = "0.0.0.0:8008"
connect_address = "10.0.0.1:8008"       # (*) where the other nodes reach it
# certfile = "/etc/pgha/rest.crt"       # with them the API speaks https
# keyfile = "/etc/pgha/rest.key"
# cafile = "/etc/pgha/ca.crt"           # who may issue clients' certificates
# verify_client = "optional"            # changes need one; "required": every request does
# allowlist = ["10.0.0.0/24"]           # changes only from here
# allowlist_include_members = true      # and from the members

# Changing requests (switchover, restart, configuration) need this user:
# [restapi.authentication]
# username = "admin"
# password_file = "/etc/pgha/rest.password"

[etcd3]
hosts = ["10.0.0.11:2379", "10.0.0.12:2379", "10.0.0.13:2379"]
# protocol = "https"
# cacert = "/etc/pgha/etcd-ca.crt"
# cert = "/etc/pgha/etcd-client.crt"
# key = "/etc/pgha/etcd-client.key"

# Used once, when the cluster is made; afterwards these live in etcd: pgha ctl edit-config
[bootstrap]
initdb = ["data-checksums", { encoding = "UTF8" }, { locale = "C.UTF-8" }]
# method = "restore"                    # instead of initdb: a cluster from a backup, made by your own program
# [bootstrap.restore]
# command = "/etc/pgha/restore"         # gets --scope=, --datadir=, and --key=value of each further key here
# recovery_conf = { restore_command = "cp /archive/%f %p", recovery_target_time = "2026-01-31 12:00:00" }

# The fast profile: a dead primary is replaced in about 6 s. An etcd election may block it for 1 to 3 s, so do not go
# below ttl 5 without measuring. The defaults, for slow networks: ttl 30, loop_wait 10, retry_timeout 10.
[bootstrap.dcs]
ttl = "5s"
loop_wait = "1s"
retry_timeout = "1s"
maximum_lag_on_failover = "1MB"         # a standby further behind does not become primary
# failsafe_mode = true                  # lead on without etcd, as long as every other member agrees
# synchronous_mode = "quorum"           # or "on": a commit waits for standbys, and only such a one becomes primary
# synchronous_node_count = 1            # how many of them
# synchronous_mode_strict = true        # without any standby commits wait, instead of going on with the primary alone
# maximum_lag_on_syncnode = "16MB"      # a standby further behind than the best is not waited for
# member_slots_ttl = "30min"            # the slot of a member whose key is gone is kept for so long
# slots.barman = { type = "physical" }  # a permanent slot: made on every node, still there after a failover
# ignore_slots = [{ name = "by_hand" }] # what matches is never dropped; other slots that nobody knows are

# [bootstrap.dcs.pgha]
# store_quota = "8GB"                   # etcd's --quota-backend-bytes, which etcd itself tells only from 3.6 on
# compaction = false                    # never compact etcd's history; by default: if nobody else does for a day
# mixed = "off"                         # Patroni members that join may follow, never lead; by default ("auto") they take part

[bootstrap.dcs.postgresql]
use_pg_rewind = true                    # an old primary comes back without a full copy

[bootstrap.dcs.postgresql.parameters]   # parameters of all nodes
max_connections = 100
wal_keep_size = "512MB"

[postgresql]
listen = "0.0.0.0:5432"
connect_address = "10.0.0.1:5432"       # (*) where clients and the other nodes reach it
data_dir = "/var/lib/postgresql/15/main"
bin_dir = "/usr/lib/postgresql/15/bin"
# custom_conf = "/etc/pgha/postgresql.conf"  # an own file that postgresql.conf includes, in place of postgresql.base.conf
pg_hba = [
    "local all all peer",
    "host all postgres 127.0.0.1/32 scram-sha-256",  # pgha itself: to 127.0.0.1 if it listens everywhere
    "host replication replicator 10.0.0.0/24 scram-sha-256",
    "host all all 10.0.0.0/24 scram-sha-256",
]

# Your programs that are waited for:
# pre_promote = "/etc/pgha/may-promote" # asked before a promotion; anything but exit code 0 leaves it to others for ttl
# before_stop = "/etc/pgha/drain"       # run before a planned stop, as far as the lock leaves time

# How a replica is made: your own programs before, or instead of, pg_basebackup; each has a table
# create_replica_methods = ["backup", "basebackup"]
# [postgresql.backup]
# command = "/etc/pgha/copy"            # gets --scope=, --role=replica, --datadir=, --connstring=, and --key=value of each further key
# no_leader = true                      # it needs no running server; also: no_params, keep_data (then it writes to data_dir itself)

# Give each user its password: password_file, or password = "...", or PGHA_SUPERUSER_PASSWORD and so on in the environment.
[postgresql.authentication.superuser]
username = "postgres"
# password_file = "/etc/pgha/superuser.password"

[postgresql.authentication.replication]
username = "replicator"
# password_file = "/etc/pgha/replication.password"

[postgresql.authentication.rewind]      # without it the superuser rewinds
username = "rewinder"
# password_file = "/etc/pgha/rewind.password"

# Your programs that are told what has happened (arguments: the event, the role, the scope); nobody waits for them.
# [postgresql.callbacks]
# on_role_change = "/etc/pgha/vip.sh"   # also on_start, on_stop, on_restart, on_reload

[postgresql.parameters]                 # parameters of this node only
shared_buffers = "128MB"

[watchdog]
mode = "automatic"                      # off, automatic (if there is a device), required
device = "/dev/watchdog"
safety_margin = "5s"

[tags]
# nofailover = true                     # never primary
# failover_priority = 1                 # at equal positions the higher one wins
# clonefrom = true                      # others prefer to clone from here
# replicatefrom = "node2"               # stream from this member while it runs, else from the primary
# noloadbalance = true                  # GET /replica says 503
# nostream = true                       # read from the archive only

[log]
type = "plain"                          # or json
level = "INFO"

[pgha]
# state_dir = "/var/lib/pgha/demo"      # default: $STATE_DIRECTORY, else <data_dir>.pgha
# runtime_dir = "/run/pgha/demo"        # default: $RUNTIME_DIRECTORY, else below /dev/shm; must be tmpfs
# callback_timeout = "60s"              # also pre_promote_timeout, before_stop_timeout: then a program is ended by force
guard = "agent"                         # who starts the guard: agent, or service (pgha-guard.service; pgha.service sets this itself)
# event_readers = 100                   # how many may follow GET /pgha/events at once; 0 to 10000
"""


def sample() -> str:
    """The text."""
    return SAMPLE
