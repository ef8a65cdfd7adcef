#!/usr/bin/env bash
# Have $CBNERF_STORAGE on this machine: share_folder.sh on the head, share_folder.sh HEAD_IP elsewhere.
set -euo pipefail
head=${1:-}

if [ "$CBNERF_NFS" = mounted ] || mountpoint -q "$CBNERF_STORAGE"; then
    mkdir -p "$CBNERF_STORAGE"
    exit
fi
sudo mkdir -p "$CBNERF_STORAGE"
if [ -n "$CBNERF_NFS" ]; then
    sudo mount -t nfs4 -o nfsvers=4.1,hard,timeo=600 "$CBNERF_NFS" "$CBNERF_STORAGE"
    sudo chown "$(id -u):$(id -g)" "$CBNERF_STORAGE"
elif [ -n "$head" ]; then
    sudo mount -t nfs4 -o nfsvers=4.1,hard,timeo=600 "$head:$CBNERF_STORAGE" "$CBNERF_STORAGE"
else
    command -v exportfs > /dev/null || sudo apt-get -qq install -y nfs-kernel-server
    sudo chown "$(id -u):$(id -g)" "$CBNERF_STORAGE"
    # Private addresses alone; the machines' security group keeps all others out as well.
    for network in 10.0.0.0/8 172.16.0.0/12 192.168.0.0/16; do
        echo "$CBNERF_STORAGE $network(rw,sync,no_subtree_check,all_squash,anonuid=$(id -u),anongid=$(id -g))"
    done | sudo tee /etc/exports.d/cbnerf.exports > /dev/null
    sudo exportfs -ra
fi
