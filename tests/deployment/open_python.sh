# open_python.sh PREFIX HOME COMMAND...: in a mount namespace, hide all of HOME but the Python that may be installed there
# at PREFIX, so that other users can run it, and then run the command.
umask 22 && mount --bind "$1" /mnt && mount -t tmpfs -o mode=755 none "$2" && mkdir -p "$1" && mount --bind /mnt "$1"
shift 2 && exec "$@"
