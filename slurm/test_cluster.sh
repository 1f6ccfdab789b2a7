#!/usr/bin/env bash
# Start / stop a throw-away SLURM cluster of N fake nodes on ONE machine: for tests, and to try the launcher (README.md).
#
#   apt-get install -y --no-install-recommends slurmctld slurmd slurm-client   # required (Debian 12: 22.05)
#   apt-get install -y --no-install-recommends slurmdbd mariadb-server          # only for DBD=1 (real sacct)
#
#   eval "$(slurm/test_cluster.sh start)"   # prints `export SLURM_CONF=...`; everything else goes to stderr
#   srun -N2 --ntasks-per-node=2 --gpus-per-node=2 -l hostname
#   slurm/test_cluster.sh kill-node n2      # SIGKILL slurmd + every job process of that node ("power loss");
#   slurm/test_cluster.sh start-node n2     #   node names: sinfo -N
#   slurm/test_cluster.sh stop
#
# No munge, no systemd, no /etc/slurm: config, state, logs and sockets live in $SLURM_TEST_DIR.
# Never use this for anything but tests on loopback (auth/none = no authentication at all).
#
# Knobs (environment): SLURM_TEST_DIR, NODES=2, CPUS=4 (fake, per node), GPUS=2 (fake, per node), MEM=4000 (MB),
#   BASE_PORT=17100, DBD=0|1, SLURMD_TIMEOUT=20 (s until a dead node is DOWN), KILL_WAIT=5 (s TERM->KILL),
#   GRACE=10 (s a preempted job has), USER_SIGNAL=1 (0: a preempted job gets TERM instead of the --signal it asked for)
set -euo pipefail
DIR=${SLURM_TEST_DIR:-${TMPDIR:-/tmp}/slurm-test-$(id -u)}
NODES=${NODES:-2} CPUS=${CPUS:-4} GPUS=${GPUS:-2} MEM=${MEM:-4000} BASE_PORT=${BASE_PORT:-17100} DBD=${DBD:-0}
SLURMD_TIMEOUT=${SLURMD_TIMEOUT:-20} KILL_WAIT=${KILL_WAIT:-5} GRACE=${GRACE:-10} USER_SIGNAL=${USER_SIGNAL:-1}
# Node names must resolve (training code connects to them). n1, n2, .. need a line "127.0.0.1 n1 n2" in /etc/hosts;
# without it the nodes are called 127.0.0.1, 127.0.0.2, .. (SLURM_JOB_NODELIST=127.0.0.[1-2]), which always resolve.
PREFIX=${PREFIX:-$(getent hosts n1 >/dev/null && getent hosts "n$NODES" >/dev/null && echo n || echo 127.0.0.)}
NODE_EXPR="$PREFIX[1-$NODES]"
ME=$(id -un)
CONF=$DIR/slurm.conf
export SLURM_CONF=$CONF PATH=$PATH:/usr/sbin:/sbin
say() { echo "slurm-test-cluster: $*" >&2; }
die() { say "$*"; exit 1; }
running() { local st; st=$(ps -o stat= -p "$1" 2>/dev/null) && [ "${st#Z}" = "$st" ]; }   # a zombie does not run
alive() { [ -f "$1" ] && running "$(cat "$1")"; }
stop_pid() { # stop_pid FILE [SIGNAL]
  alive "$1" || return 0
  local p; p=$(cat "$1"); kill "-${2:-TERM}" "$p" 2>/dev/null || return 0
  for _ in $(seq 50); do running "$p" || return 0; sleep 0.1; done
  kill -KILL "$p" 2>/dev/null || true
}
wait_for() { local n=$1; shift; for _ in $(seq "$n"); do "$@" >/dev/null 2>&1 && return 0; sleep 0.5; done; return 1; }

write_conf() {
  mkdir -p "$DIR"/{state,log,run,spool}
  # cred_expire is also how long a requeued job waits before it may start again (default 120 s)
  cat > "$CONF" <<C
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$((BASE_PORT))
SlurmUser=$ME
SlurmdUser=$ME
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=10
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd.%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
JobRequeue=1
SlurmdTimeout=$SLURMD_TIMEOUT
KillWait=$KILL_WAIT
MinJobAge=300
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
$([ "$USER_SIGNAL" = 1 ] && echo SlurmctldParameters=preempt_send_user_signal)
AccountingStorageType=$([ "$DBD" = 1 ] && echo accounting_storage/slurmdbd || echo accounting_storage/none)
$([ "$DBD" = 1 ] && printf 'AccountingStorageHost=127.0.0.1\nAccountingStoragePort=%s\n' $((BASE_PORT + 1)))
JobAcctGatherType=jobacct_gather/$([ "$DBD" = 1 ] && echo linux || echo none)
NodeName=$NODE_EXPR NodeHostName=localhost NodeAddr=127.0.0.1 Port=[$((BASE_PORT + 11))-$((BASE_PORT + 10 + NODES))] CPUs=$CPUS RealMemory=$MEM$([ "$GPUS" -gt 0 ] && echo " Gres=gpu:$GPUS") State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 GraceTime=$GRACE
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
C
  # Fake GPUs: any character devices will do; every container has these. SLURM then sets CUDA_VISIBLE_DEVICES=0,1,..
  # (gres.conf with a bare Count= is refused: "gres/gpu count reported lower than configured").
  local devs=(/dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty) g
  [ "$GPUS" -le ${#devs[@]} ] || die "at most ${#devs[@]} fake GPUs per node"
  for g in $(seq "$GPUS"); do echo "NodeName=$NODE_EXPR Name=gpu File=${devs[g - 1]}"; done > "$DIR/gres.conf"
  if [ "$DBD" = 1 ]; then
    cat > "$DIR/slurmdbd.conf" <<C
AuthType=auth/none
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((BASE_PORT + 1))
SlurmUser=$ME
PidFile=$DIR/run/slurmdbd.pid
LogFile=$DIR/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((BASE_PORT + 2))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
C
    chmod 600 "$DIR/slurmdbd.conf"
  fi
}

start_db() {
  if ! alive "$DIR/run/mariadb.pid"; then
    mkdir -p "$DIR/db"; local asuser=()
    if [ "$(id -u)" = 0 ]; then asuser=(--user=mysql); chown mysql "$DIR/db" "$DIR/run"; chmod 755 "$DIR"; fi
    [ -d "$DIR/db/mysql" ] || mariadb-install-db --no-defaults "${asuser[@]}" --datadir="$DIR/db" \
      --auth-root-authentication-method=normal --skip-test-db > "$DIR/log/mariadb-install.log" 2>&1
    mariadbd --no-defaults "${asuser[@]}" --datadir="$DIR/db" --socket="$DIR/run/mariadb.sock" \
      --pid-file="$DIR/run/mariadb.pid" --bind-address=127.0.0.1 --port=$((BASE_PORT + 2)) \
      --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 --log-error="$DIR/log/mariadb.log" >/dev/null 2>&1 </dev/null &
    wait_for 60 mariadb -u root -S "$DIR/run/mariadb.sock" -e 'select 1' || die "mariadbd did not start, see $DIR/log/mariadb.log"
    mariadb -u root -S "$DIR/run/mariadb.sock" -e "create database if not exists slurm_acct_db;
      create user if not exists slurm@'127.0.0.1' identified by 'slurm'; create user if not exists slurm@localhost identified by 'slurm';
      grant all on slurm_acct_db.* to slurm@'127.0.0.1'; grant all on slurm_acct_db.* to slurm@localhost"
  fi
  # slurmdbd only looks for slurmdbd.conf beside SLURM_CONF
  alive "$DIR/run/slurmdbd.pid" || slurmdbd >/dev/null 2>&1 </dev/null
  wait_for 40 sacctmgr -n list cluster || die "slurmdbd did not start, see $DIR/log/slurmdbd.log"
  sacctmgr -n list cluster format=Cluster | grep -qw test || sacctmgr -i add cluster test >/dev/null 2>&1 || true
}

start_node() {
  mkdir -p "$DIR/spool/$1"
  alive "$DIR/run/slurmd.$1.pid" || slurmd -f "$CONF" -N "$1" >/dev/null 2>&1 </dev/null
}

# pids of node $1's jobs, the slurmstepds first (so that they cannot report the death of their tasks)
node_job_pids() {
  local d pid tasks=
  for d in /proc/[0-9]*; do
    grep -zqxF "SLURM_CONF=$CONF" "$d/environ" 2>/dev/null || continue
    grep -zqxF "SLURMD_NODENAME=$1" "$d/environ" 2>/dev/null || continue
    tasks="$tasks ${d#/proc/}"
  done
  for pid in $tasks; do
    pid=$(awk '{print $4}' "/proc/$pid/stat" 2>/dev/null) || continue
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = slurmstepd ] && echo "$pid"
  done | sort -u
  for pid in $tasks; do echo "$pid"; done
}

case ${1:-} in
start)
  for c in slurmctld slurmd srun; do command -v $c >/dev/null || die "$c is missing (apt-get install slurmctld slurmd slurm-client)"; done
  write_conf
  if [ "$DBD" = 1 ]; then start_db; fi
  alive "$DIR/run/slurmctld.pid" || slurmctld -f "$CONF" >/dev/null 2>&1 </dev/null
  for i in $(seq "$NODES"); do start_node "$PREFIX$i"; done
  idle() { [ "$(sinfo -h -p gpu -t idle -o %D 2>/dev/null)" = "$NODES" ]; }
  wait_for 60 idle || { sinfo >&2 || true; die "nodes did not come up, see $DIR/log"; }
  say "up: $(sinfo -h -p gpu -o '%D nodes, %c cpus, %G')"
  echo "export SLURM_CONF=$CONF"
  ;;
stop)
  [ -f "$CONF" ] || exit 0
  timeout 10 scancel -u "$ME" --full 2>/dev/null || true
  sleep 1
  for f in "$DIR"/run/slurmd.*.pid "$DIR/run/slurmctld.pid" "$DIR/run/slurmdbd.pid" "$DIR/run/mariadb.pid"; do stop_pid "$f"; done
  ;;
start-node) start_node "$2"; scontrol update nodename="$2" state=resume 2>/dev/null || true ;;
kill-node)  # what the rest of the cluster sees when the machine loses power
  stop_pid "$DIR/run/slurmd.$2.pid" KILL
  for p in $(node_job_pids "$2"); do kill -KILL "$p" 2>/dev/null || true; done ;;
status) sinfo; squeue ;;
*) die "usage: $0 start|stop|status|kill-node NODE|start-node NODE" ;;
esac
