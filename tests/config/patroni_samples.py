"""Patroni configurations such as people have them, with passwords that must never be shown."""

from __future__ import annotations

HUSH = "hush-"

#: Everything in it has its place in pgha.
SUPPORTED = """\
scope: billing
namespace: /db/
name: pg1

restapi:
  listen: 0.0.0.0:8008
  connect_address: 10.20.0.1:8008
  authentication: {username: admin, password: "hush-rest: #1"}

etcd3:
  hosts:
  - 10.20.0.11:2379
  - 10.20.0.12:2379
  - 10.20.0.13:2379
  protocol: https
  cacert: /etc/etcd/ca.crt
  cert: /etc/etcd/client.crt
  key: /etc/etcd/client.key
  username: patroni
  password: hush-etcd

bootstrap:
  dcs:
    ttl: 30
    loop_wait: 10
    retry_timeout: 10
    maximum_lag_on_failover: 1048576
    synchronous_mode: true
    failsafe_mode: on
    postgresql:
      use_pg_rewind: true
      use_slots: true
      parameters:
        max_connections: 200
        archive_mode: "on"
        archive_command: 'test ! -f "/archive/%f" && cp %p /archive/%f'
        archive_timeout: 1800s
      recovery_conf:
        restore_command: cp /archive/%f %p
  initdb:             # a list of maps and words
  - encoding: UTF8
  - locale: en_US.UTF-8
  - data-checksums
  post_bootstrap: /usr/local/bin/make-users.sh

postgresql:
  listen: 127.0.0.1,10.20.0.1:5432
  connect_address: 10.20.0.1:5432
  data_dir: /var/lib/postgresql/16/main
  bin_dir: /usr/lib/postgresql/16/bin
  pgpass: /var/lib/postgresql/pgpass
  authentication:
    superuser: {username: postgres, password: hush-superuser, sslmode: verify-full, sslpassword: hush-sslpassword}
    replication:
      username: replicator
      password: 'hush-replication ''quoted'''
    rewind:
      username: rewind_user
      password: hush-rewind
  create_replica_methods:
  - basebackup
  basebackup:
  - verbose
  - max-rate: 100M
  pg_hba:
  - local all all peer
  - hostssl replication replicator 10.20.0.0/24 scram-sha-256
  - host all all 10.20.0.0/24 scram-sha-256
  parameters:
    unix_socket_directories: /var/run/postgresql
    shared_buffers: 8GB

watchdog:
  mode: automatic
  device: /dev/watchdog
  safety_margin: 5

tags:
  nofailover: false
  noloadbalance: true
  clonefrom: true
  nosync: false
  replicatefrom: pg2
  rack: 7
"""

#: What a few years leave behind: permanent slots, pgBackRest, callbacks, logs in files, TLS for REST with its members.
GROWN = """\
---
scope: &cluster 'orders'
namespace: /service/
name: db-3

log:
  level: INFO
  dir: /var/log/patroni
  file_num: 4
  file_size: 25000000
  format: '%(asctime)s %(levelname)s: %(message)s'
  deduplicate_heartbeat_logs: true
  loggers:
    patroni.postmaster: WARNING
    urllib3: DEBUG

restapi:
  listen: 192.168.7.3:8008
  connect_address: 192.168.7.3:8008
  certfile: /etc/patroni/tls/server.pem
  keyfile: /etc/patroni/tls/server.key
  keyfile_password: hush-keyfile
  cafile: /etc/patroni/tls/ca.pem
  verify_client: optional
  allowlist: [192.168.7.0/24, 127.0.0.1]
  allowlist_include_members: true
  http_extra_headers: {X-Cluster: *cluster}
  authentication:
    username: patroni
    password: hush-restapi

ctl:
  insecure: false
  certfile: /etc/patroni/tls/client.pem
  keyfile: /etc/patroni/tls/client.key
  cacert: /etc/patroni/tls/ca.pem
  authentication: {username: patroni, password: hush-ctl}

etcd3: {hosts: "192.168.7.1:2379,192.168.7.2:2379,192.168.7.3:2379"}

bootstrap:
  method: pgbackrest
  pgbackrest:
    command: /etc/patroni/bootstrap-from-repository.sh
    keep_existing_recovery_conf: true
    no_params: true
    recovery_conf:
      recovery_target_action: promote
      recovery_target_timeline: latest
      restore_command: pgbackrest --stanza=orders archive-get %f "%p"
  dcs:
    ttl: 30
    loop_wait: 10
    retry_timeout: 10
    maximum_lag_on_failover: 33554432
    master_start_timeout: 300
    synchronous_mode: quorum
    check_timeline: true
    member_slots_ttl: 1h
    slots:
      barman:
      debezium: {type: logical, database: orders, plugin: pgoutput}
      warehouse:
        type: physical
        cluster_type: primary
    ignore_slots:
    - {name: by_hand, type: logical}
    standby_cluster: {}
    postgresql:
      use_pg_rewind: true
      remove_data_directory_on_diverged_timelines: true
      parameters:
        wal_level: logical
        hot_standby: "on"
        wal_keep_segments: 8
        max_wal_senders: 16
        listen_addresses: '*'
        archive_mode: on
        archive_command: pgbackrest --stanza=orders archive-push %p
      recovery_conf:
        restore_command: pgbackrest --stanza=orders archive-get %f "%p"
        recovery_target_timeline: latest
      pg_hba: &rules
      - local all all peer
      - hostssl all all 192.168.7.0/24 scram-sha-256

postgresql:
  listen: '*:5432'
  connect_address: 192.168.7.3:5432
  proxy_address: 192.168.7.3:6432
  data_dir: /pgdata/15
  config_dir: /etc/postgresql/15/orders
  bin_dir: /usr/pgsql-15/bin
  bin_name: {postgres: postgres-custom}
  use_unix_socket: true
  use_unix_socket_repl: false
  pg_hba: *rules
  callbacks:
    on_role_change: /etc/patroni/vip.sh
    on_start: /etc/patroni/vip.sh
    on_stop:
  pre_promote: /etc/patroni/may-promote.sh
  create_replica_methods: [pgbackrest, basebackup]
  pgbackrest:
    command: /usr/bin/pgbackrest --stanza=orders restore --type=none
    keep_data: True
    no_params: True
    no_leader: 1
  basebackup: {max-rate: 200M, checkpoint: fast}
  authentication:
    superuser: {username: postgres, password: hush-postgres}
    replication: {username: replicator, password: hush-replicator}
  parameters:
    max_connections: 500
    work_mem: 64MB
    log_line_prefix: >
      %m [%p]
  remove_data_directory_on_rewind_failure: true

watchdog: {mode: off, driver: default}
tags: {nofailover: false, noloadbalance: false, clonefrom: false, replicatefrom: }
"""

#: From before Patroni 2: etcd's old API, users of the bootstrap, WAL-G, names with master.
OLD = """\
scope: legacy
name: 'pg0'
thread_pool_size: 8
restapi: {listen: 127.0.0.1:8008, connect_address: 127.0.0.1:8008}
etcd:
  host: 127.0.0.1:2379
  username: root
  password: hush-etcd2
  cacert: /unused/ca.crt
bootstrap:
  dcs:
    ttl: 20
    loop_wait: 10
    retry_timeout: 10
    synchronous_mode: off
    postgresql:
      parameters: {wal_level: hot_standby, max_connections: 20, max_replication_slots: 10}
  initdb: [{encoding: UTF8}, data-checksums]
  pg_hba:
  - host replication replicator 127.0.0.1/32 md5
  - host all all 0.0.0.0/0 md5
  users:
    admin:
      password: hush-admin
      options: [createrole, createdb]
postgresql:
  listen: 127.0.0.1:5432
  connect_address: 127.0.0.1:5432
  data_dir: data/pg0
  pgpass: /tmp/pgpass0
  create_replica_method: [wal_g]
  wal_g: {command: /usr/local/bin/wal-g-restore.sh, threshold_megabytes: 10240, envdir: /etc/wal-g.d/env}
  authentication:
    replication: {username: replicator, password: 20190101}
    superuser: {username: postgres, password: hush-super}
  parameters: {port: 5433, shared_buffers: 128MB}
ttl: 30
"""

ALL = {"supported": SUPPORTED, "grown": GROWN, "old": OLD}
