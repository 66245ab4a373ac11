#!/usr/bin/env bash
# A real SLURM of two nodes, n0 and n1, on this machine, for trying things and for the tests: deploy/ansible sets it up,
# as it does a cluster, from inventories/local.
#
#   deploy/slurm/local_cluster.sh start   install what is missing (Debian, Ubuntu), start, print the line to export
#   deploy/slurm/local_cluster.sh play PLAYBOOK ...   run a playbook of deploy/ansible on it
#   deploy/slurm/local_cluster.sh stop
#
# Both nodes are this machine, each with 8 pretended cores and 4 pretended GPUs. Partitions: main (the default) and
# urgent, whose jobs requeue those of main. Everything is kept in SLURM_LOCAL (default: /tmp/infinitecontext-slurm).
# Ports: SLURM_LOCAL_PORT (default: 17000) and the five after it.
# Exit code 77: this machine cannot run it (no root, no apt, no Ansible, no private mount namespace).
set -euo pipefail

export SLURM_LOCAL=${SLURM_LOCAL:-/tmp/infinitecontext-slurm}
export SLURM_LOCAL_PORT=${SLURM_LOCAL_PORT:-17000}
STATE=$SLURM_LOCAL
ANSIBLE=$(cd "$(dirname "${BASH_SOURCE[0]}")/../ansible" && pwd)
export SLURM_CONF=$STATE/head/slurm.conf

cannot() {
    echo "error: no local SLURM here: $1" >&2
    exit 77
}

failed() {
    echo "error: the local SLURM does not work: $1" >&2
    exit 1
}

running() { # NAME: whether NAME.pid holds the process id of that daemon, not of one that is dead or of another program
    [[ -s $STATE/$1.pid ]] &&
        tr '\0' ' ' 2>/dev/null <"/proc/$(cat "$STATE/$1.pid")/cmdline" | grep -qF -- "${1%-n[01]}"
} 2>/dev/null

prepare() {
    [[ $(id -u) == 0 ]] || cannot "root is needed"
    command -v apt-get >/dev/null || cannot "there is no apt-get"
    command -v ansible-playbook >/dev/null || cannot "there is no ansible-playbook: pip install '.[slurm]'"
    unshare -m true 2>/dev/null || cannot "a private mount namespace is needed (unshare -m)"
    mkdir -p "$STATE"
    [[ -e $STATE/hosts ]] || cp /etc/hosts "$STATE/hosts"
    local file
    for file in gpu0 gpu1 gpu2 gpu3; do
        [[ -e $STATE/$file ]] || mknod "$STATE/$file" c 1 3 || cannot "device files cannot be made in $STATE"
    done
    touch "$STATE"/kernel-n{0,1}.log # what the health check reads in place of the kernel's log
    [[ -e $STATE/vault.yml ]] || make_vault
}

random() { # 64 hexadecimal digits
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n'
}

make_vault() {
    (umask 077 && random >"$STATE/vault-password")
    printf 'vault_slurm_munge_key: %s\nvault_slurm_database_password: %s\n' "$(random)" "$(random)" |
        ansible-vault encrypt --vault-password-file "$STATE/vault-password" --output "$STATE/vault.yml" 2>/dev/null
}

play() { # PLAYBOOK ...: in a mount namespace, in which n0 and n1 are names of this machine; jobs find the nodes by name
    export ANSIBLE_CONFIG=$ANSIBLE/ansible.cfg ANSIBLE_CACHE_PLUGIN_CONNECTION=$STATE/facts
    unshare -m bash -euc 'mount --bind "$SLURM_LOCAL/hosts" /etc/hosts; exec ansible-playbook "$@"' play \
        --inventory "$ANSIBLE/inventories/local" --extra-vars "@$STATE/vault.yml" \
        --vault-password-file "$STATE/vault-password" "$ANSIBLE/$1" "${@:2}" </dev/null
}

start() {
    local file
    prepare
    if ! running slurmctld || ! running slurmd-n0 || ! running slurmd-n1; then
        stop
        for file in "$STATE"/kernel-n{0,1}.log; do : >"$file"; done
        rm -rf "$STATE/state" # nothing of jobs and of health that an earlier cluster left, killed perhaps
        play site.yml >"$STATE/play.log" 2>&1 || { tail -20 "$STATE/play.log" >&2; failed "see $STATE/play.log"; }
    fi
    for _ in $(seq 60); do
        if [[ $(timeout 5 sinfo -h -N -p main -t idle,alloc,mix -o %n 2>/dev/null | wc -l) == 2 ]]; then
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.5
    done
    failed "the nodes did not come up within 30 s; see the logs in $STATE"
}

stop() {
    if running slurmctld && running slurmd-n0; then # kill what runs, so that no process of a job stays behind
        timeout 10 scancel --state=RUNNING,PENDING,SUSPENDED --user=root 2>/dev/null || true
        for _ in $(seq 30); do
            [[ -z $(timeout 5 squeue -h 2>/dev/null) ]] && break
            sleep 0.5
        done
    fi
    local name pid
    for name in slurmd-n0 slurmd-n1 slurmctld slurmdbd mariadb munge-{head,n0,n1} node-exporter; do
        running "$name" || continue
        pid=$(cat "$STATE/$name.pid")
        kill "$pid" 2>/dev/null || true
        for _ in $(seq 120); do
            running "$name" || break
            sleep 0.25
        done
        rm -f "$STATE/$name.pid"
    done
}

case ${1:-} in
start) start ;;
play)
    prepare
    play "${@:2}"
    ;;
stop) stop ;;
*)
    sed -n '2,13s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
