#!/usr/bin/env bash
# The first process of a host made of namespaces (hosts.py): what it mounts and starts ends with it.
#
#     boot.sh FOLDER SHM_BYTES HOME PATH...      exits with 77 where such mounts are not allowed
#
# The host has this machine's files, but what it writes goes into a layer of its own. /tmp, /run,
# /dev/shm and HOME begin empty. Of what is hidden by that, or lies on another file system, it sees
# each PATH. FOLDER holds the keys and settings that hosts.py has written, and a place for the layer.
set -euo pipefail
folder=$1 shm_bytes=$2 home=$3
shift 3
host=$(hostname)

trap 'exit 77' ERR # of mounts: they are not allowed here; everything else is an error of this test
mount --make-rprivate /
mkdir "$folder/$host"
mount -t tmpfs "$host" "$folder/$host"
cd "$folder/$host"
mkdir written work root
mount -t overlay "$host" -o lowerdir=/,upperdir=written,workdir=work root
mount -t proc proc root/proc
mount --rbind /sys root/sys
mount --rbind /dev root/dev
mount -t tmpfs -o size="$shm_bytes" shm root/dev/shm
mount -t tmpfs run root/run
mount -t tmpfs -o mode=1777 tmp root/tmp
mount -t tmpfs -o mode=700 home "root$home"
for path in "$folder" "$@"; do
    if [ ! -e "root$path" ]; then
        mkdir -p "root$path"
        mount --bind "$path" "root$path"
    fi
done
trap - ERR

cp "$folder/hosts" root/etc/hosts
cp "$folder/bashrc" "root$home/.bashrc"
sed -i 's/^root:[^:]*:/root:*:/' root/etc/shadow # sshd lets nobody in whose account is locked
mkdir root/run/sshd
ulimit -l unlimited 2>/dev/null || true # as --ulimit memlock=-1 does, where that is allowed
exec chroot root /usr/sbin/sshd -D -e -f "$folder/sshd_config"
