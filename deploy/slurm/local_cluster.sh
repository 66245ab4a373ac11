#!/usr/bin/env bash
# A real SLURM of two nodes, n0 and n1, on this machine, for trying things and for `pytest -m slurm`.
#
#   deploy/slurm/local_cluster.sh start   install what is missing (Debian, Ubuntu), start, print the line to export
#   deploy/slurm/local_cluster.sh stop
#
# Both nodes are this machine, each with 8 pretended cores and 4 pretended GPUs. Partitions: main (the default) and
# urgent, whose jobs requeue those of main. Everything is kept in SLURM_LOCAL (default: /tmp/infinitecontext-slurm).
# Exit code 77: this machine cannot run it (no root, no apt, no private mount namespace).
set -euo pipefail

STATE=${SLURM_LOCAL:-/tmp/infinitecontext-slurm}
PACKAGES=(munge slurmctld slurmd slurm-client slurm-wlm-basic-plugins)
export SLURM_CONF=$STATE/slurm.conf

cannot() {
    echo "error: no local SLURM here: $1" >&2
    exit 77
}

running() { # NAME: whether the daemon whose process id NAME.pid holds is alive
    [[ -s $STATE/$1.pid ]] && kill -0 "$(cat "$STATE/$1.pid")" 2>/dev/null
}

install_packages() {
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && return
    command -v apt-get >/dev/null || cannot "install ${PACKAGES[*]} first (there is no apt-get)"
    # Installing must not start the daemons with the distribution's configuration; ours are started by hand below.
    local policy=/usr/sbin/policy-rc.d installed=0
    [[ -e $policy ]] && policy= || printf '#!/bin/sh\nexit 101\n' >"$policy"
    [[ -z $policy ]] || chmod +x "$policy"
    {
        timeout 120 apt-get update -q &&
            DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -qy --no-install-recommends "${PACKAGES[@]}"
    } >"$STATE/apt.log" 2>&1 </dev/null || installed=$?
    [[ -z $policy ]] || rm -f "$policy"
    [[ $installed == 0 ]] || cannot "apt-get could not install ${PACKAGES[*]}; see $STATE/apt.log"
}

write_configuration() {
    local i
    for i in 0 1 2 3; do
        [[ -e $STATE/gpu$i ]] || mknod "$STATE/gpu$i" c 1 3 || cannot "device files cannot be made in $STATE"
    done
    echo "Name=gpu File=$STATE/gpu[0-3]" >"$STATE/gres.conf"
    cat >"$STATE/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=17000
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# Without cred_expire a requeued job waits two minutes for its old credential to expire.
AuthInfo=socket=$STATE/munge/socket,cred_expire=5
StateSaveLocation=$STATE/state
SlurmdSpoolDir=$STATE/spool-%n
SlurmctldPidFile=$STATE/slurmctld.pid
SlurmdPidFile=$STATE/slurmd-%n.pid
SlurmctldLogFile=$STATE/slurmctld.log
SlurmdLogFile=$STATE/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=10
GresTypes=gpu
# The cores and the memory below are pretended.
SlurmdParameters=config_overrides
NodeName=n0 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=17001 CPUs=8 RealMemory=64000 Gres=gpu:4
NodeName=n1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=17002 CPUs=8 RealMemory=64000 Gres=gpu:4
PartitionName=main Nodes=n[0-1] Default=YES PriorityTier=1
PartitionName=urgent Nodes=n[0-1] PriorityTier=10
CONF
}

start_daemons() {
    # Jobs find the nodes by name: in a mount namespace of the daemons, so that the machine's own /etc/hosts stays.
    { cat /etc/hosts && echo "127.0.0.1 n0 n1"; } >"$STATE/hosts"
    STATE=$STATE unshare -m bash -euc '
        mount --bind "$STATE/hosts" /etc/hosts
        setpriv --reuid=munge --regid=munge --clear-groups munged --socket="$STATE/munge/socket" \
            --key-file="$STATE/munge/key" --pid-file="$STATE/munge/munged.pid" --log-file="$STATE/munge/log" \
            --seed-file="$STATE/munge/seed"
        slurmctld -f "$SLURM_CONF"
        slurmd -f "$SLURM_CONF" -N n0
        slurmd -f "$SLURM_CONF" -N n1
    ' </dev/null >"$STATE/start.log" 2>&1 || { cat "$STATE/start.log" >&2; cannot "the daemons did not start; see $STATE"; }
}

start() {
    [[ $(id -u) == 0 ]] || cannot "root is needed"
    unshare -m true 2>/dev/null || cannot "a private mount namespace is needed (unshare -m)"
    mkdir -p "$STATE/state"
    if ! running slurmctld || ! running slurmd-n0 || ! running slurmd-n1; then
        stop
        install_packages
        write_configuration
        rm -rf "$STATE/munge" # its key lives as long as the daemons
        install -d -o munge -g munge -m 755 "$STATE/munge"
        (umask 077 && head -c 1024 /dev/urandom >"$STATE/munge/key")
        chown munge:munge "$STATE/munge/key"
        start_daemons
    fi
    for _ in $(seq 60); do
        if [[ $(timeout 5 sinfo -h -N -p main -t idle,alloc,mix -o %n 2>/dev/null | wc -l) == 2 ]]; then
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.5
    done
    cannot "the nodes did not come up within 30 s; see the logs in $STATE"
}

stop() {
    if running slurmctld && running slurmd-n0; then # kill what runs, so that no process of a job stays behind
        timeout 10 scancel --state=RUNNING,PENDING,SUSPENDED --user=root 2>/dev/null || true
        for _ in $(seq 30); do
            [[ -z $(timeout 5 squeue -h 2>/dev/null) ]] && break
            sleep 0.5
        done
    fi
    local file pid
    for file in "$STATE"/{slurmd-n0,slurmd-n1,slurmctld,munge/munged}.pid; do
        [[ -s $file ]] || continue
        pid=$(cat "$file")
        kill "$pid" 2>/dev/null || true
        for _ in $(seq 40); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.25
        done
        rm -f "$file"
    done
}

case ${1:-} in
start) start ;;
stop) stop ;;
*)
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
