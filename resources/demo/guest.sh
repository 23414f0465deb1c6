# What the guest of `make run` does; started by its init as /guest.sh.
# Its last act is a line with the disk's own count of requests, written behind the file system, where the scenario on the
# other side finds it when the machine has ended.

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
now() { read -r up idle </proc/uptime; echo "${up%.*}${up#*.}"; } # hundredths of a second
rate() { # BYTES FROM TO
    span=$(($3 - $2))
    [ $span -gt 0 ] || span=1
    echo "$(($1 * 100 / span / 1048576)).$(($1 * 1000 / span / 1048576 % 10)) MiB/s"
}

dmesg -n 3
busybox --install -s /bin
say "This is Linux $(uname -r), $(nproc) CPU, $(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo) MiB"
say "Its disk is /dev/vda, served by another process:"
mount -t ext4 /dev/vda /mnt && df -h /mnt
ls -l /mnt
say "A file on it:"
cat /mnt/hello.txt

say "Writing 4 MiB, and reading them back:"
head -c 4194304 /dev/urandom >/tmp/data
written=$(md5sum </tmp/data)
before=$(now)
dd if=/tmp/data of=/mnt/data bs=64k conv=fsync 2>/dev/null
echo "written   $(rate 4194304 "$before" "$(now)")"
umount /mnt
echo 3 >/proc/sys/vm/drop_caches
mount -t ext4 /dev/vda /mnt
before=$(now)
read=$(md5sum </mnt/data)
echo "read back $(rate 4194304 "$before" "$(now)")"
if [ "$read" = "$written" ]; then echo "the same:  ${read%% *}"; else echo "NOT THE SAME: $written, $read"; fi
before=$(now)
dd if=/dev/vda of=/dev/null bs=4k count=1000 iflag=direct 2>/dev/null
after=$(now)
[ "$after" -gt "$before" ] || after=$((before + 1))
echo "throughput of direct 4 KiB reads, one at a time: $((100000 / (after - before))) requests/s, $(rate 4096000 "$before" "$after")"

case " $(cat /proc/cmdline) " in
    *" demo.shell "*)
        say "A shell; the disk is on /mnt. 'exit' powers off (Ctrl-A x ends the machine at once)."
        read -r console </sys/class/tty/console/active
        cd /mnt || cd /
        PS1='guest:\w# ' setsid -c sh <"/dev/${console##* }" >"/dev/${console##* }" 2>&1
        cd /
        ;;
esac

umount /mnt
set -- $(cat /sys/block/vda/stat)
echo "requests $(($1 + $5)) reads $1 writes $5" | dd of=/dev/vda bs=1M seek=31 conv=notrunc,fsync 2>/dev/null
[ "$read" = "$written" ]
