#!/bin/sh
# The first process of a client. Its root is the host's, read-only; what it writes is in memory, on the server, or in
# /mnt/shared, a folder of the host. Makes mounts, then becomes the process that does the host's jobs.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs none /mnt
mkdir -p /mnt/modules /mnt/shared /mnt/cache /mnt/tmp /dev/shm
for folder in /run /var/lib/nfs /dev/shm; do mount -t tmpfs none $folder; done
mount -t hostfs -o "$SHARED" none /mnt/shared
mount -t hostfs -o /usr/lib/uml/modules/"$(uname -r)" none /mnt/modules
cd /mnt/modules
for wanted in kernel/fs/nfs/nfsv3.ko kernel/fs/nfs/nfsv4.ko; do
    order=$wanted
    for module in $(sed -n "s|^$wanted:||p" modules.dep); do order="$module $order"; done
    for module in $order; do busybox insmod "$module" 2>/dev/null; done  # some are there already
done
ip link set lo up
ip addr add "$ADDRESS/24" dev "$CARD"
ip link set "$CARD" up
mkdir -p /var/lib/nfs/sm /var/lib/nfs/sm.bak
hostname "client-$ADDRESS"
rpcbind
rpc.statd --no-notify
cd /
export TMPDIR=/mnt/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONHASHSEED=0 OMP_NUM_THREADS=1
exec "$PYTHON" -c "import sys; sys.path[:0] = '$SOURCES'.split(':'); from trials.nfs.guest import main; main()"
