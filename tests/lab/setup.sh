# shellcheck shell=bash
# What the lab needs on the host: Debian packages, guest kernels, the lab's image. Everything is kept under
# $LAB_CACHE and made in a temporary place first, so that an interrupted set-up leaves nothing half done; one
# lock lets two processes ask at once. Never touches the system, but for apt-get install of what is missing.

LAB_KERNELS="6.12 6.1"
# Modules of the lab's own kernel, in the order of loading. Those built into a kernel are skipped by
# themselves.
LAB_OUTER_MODULES="virtio virtio_ring virtio_pci virtio_console irqbypass kvm kvm-amd"
LAB_OUTER_EXTRA_MODULES="tun vhost_net vhost_vsock overlay"
# Debian's generic kernel of this series has the drivers that the cloud kernels leave out: more for guests,
# and for the lab itself stand-ins for hardware. Only fetched for those who ask (`lab generic`).
LAB_GENERIC_SERIES=6.12
LAB_GENERIC_GUEST_DRIVERS="virtio_input evdev virtio_crypto algif_skcipher virtio_snd snd-pcm-oss virtio-gpu gpio-pci-idio-16 e1000e xhci_pci usb_storage"
LAB_GENERIC_OUTER_MODULES="uinput evdev vcan can-raw"
LAB_RECIPE=1

lab_setup() {
    local stamp
    mkdir -p "$LAB_CACHE"
    stamp=$(lab_stamp)
    if [ "$(cat "$LAB_CACHE/ready" 2>/dev/null)" = "$stamp" ]; then return; fi
    exec 9>"$LAB_CACHE/lock"
    flock -n 9 || { say "waiting for another set-up to end"; flock 9; }
    stamp=$(lab_stamp)
    if [ "$(cat "$LAB_CACHE/ready" 2>/dev/null)" != "$stamp" ]; then
        rm -rf "$LAB_CACHE"/setup.??????
        LAB_WORK=$(mktemp -d "$LAB_CACHE/setup.XXXXXX")
        trap 'rm -rf "$LAB_WORK"' EXIT
        lab_packages
        lab_kernels
        lab_guest_images
        lab_outer_images
        rm -rf "$LAB_WORK"
        trap - EXIT
        lab_stamp >"$LAB_CACHE/ready.new"
        mv "$LAB_CACHE/ready.new" "$LAB_CACHE/ready"
        say "ready in $LAB_CACHE"
    fi
    exec 9>&-
}

# The generic kernel, for those who want its drivers: in the guest (kernel/generic/elf, initramfs, drivers) or
# in the lab (`--kernel generic`). 100 MB are downloaded, once.
lab_generic() {
    local kernel=$LAB_CACHE/kernel/generic stamp
    stamp=$(lab_generic_stamp)
    if [ "$(cat "$kernel/ready" 2>/dev/null)" = "$stamp" ]; then return; fi
    exec 9>"$LAB_CACHE/lock"
    flock 9
    LAB_WORK=$(mktemp -d "$LAB_CACHE/setup.XXXXXX")
    trap 'rm -rf "$LAB_WORK"' EXIT
    [ -s "$kernel/bzimage" ] || lab_fetch_kernel "$LAB_GENERIC_SERIES" amd64 generic || die "no generic Debian kernel here"
    # shellcheck disable=SC2086
    "$LAB_ROOT/resources/guest/make-initramfs" "$kernel" "$kernel/initramfs" "$kernel/drivers" $LAB_GENERIC_GUEST_DRIVERS
    lab_outer_modules generic "$LAB_OUTER_MODULES $LAB_GENERIC_OUTER_MODULES"
    rm -rf "$LAB_WORK" "$LAB_CACHE/apt"
    trap - EXIT
    lab_generic_stamp >"$kernel/ready"
    exec 9>&-
}

lab_generic_stamp() {
    stat -L -c '%n %a %s %Y' "$LAB_DIR"/setup.sh "$LAB_ROOT"/resources/guest/* "$LAB_CACHE/kernel/generic/bzimage" 2>/dev/null || true
}

# Everything the images are made of, as name, size and time: cheap to take, and it changes with every edit or
# upgrade.
lab_stamp() {
    printf 'recipe %s\n' "$LAB_RECIPE"
    stat -L -c '%n %a %s %Y' "$LAB_DIR"/setup.sh "$LAB_DIR"/init "$LAB_ROOT"/resources/guest/* \
        /usr/bin/busybox /bin/busybox /usr/bin/qemu-system-x86_64 /usr/bin/qemu-storage-daemon \
        "$LAB_CACHE"/kernel/*/bzimage 2>/dev/null || true
}

# --- packages ---

# command:package. qemu-utils is not asked for: it brings another QEMU where backports are on.
LAB_COMMANDS="qemu-system-x86_64:qemu-system-x86 busybox:busybox-static cpio:cpio lz4:lz4 zstd:zstd xz:xz-utils depmod:kmod
    mke2fs:e2fsprogs setpriv:util-linux flock:util-linux dpkg-deb:dpkg"

lab_packages() {
    local pair missing=""
    for pair in $LAB_COMMANDS; do
        command -v "${pair%%:*}" >/dev/null || missing+=" ${pair##*:}"
    done
    if ! lab_static_busybox; then missing+=" busybox-static"; fi
    [ -z "$missing" ] || lab_install "$missing"
    # A part of qemu-system-common in Debian 12, of qemu-utils later.
    if ! command -v qemu-storage-daemon >/dev/null; then
        lab_install qemu-system-common
        command -v qemu-storage-daemon >/dev/null || lab_install qemu-utils
    fi
    for pair in $LAB_COMMANDS qemu-storage-daemon:qemu-utils; do
        command -v "${pair%%:*}" >/dev/null || die "${pair%%:*} is still missing; it is in Debian's package ${pair##*:}"
    done
    lab_static_busybox || die "busybox is not static; it is in Debian's package busybox-static"
}

lab_static_busybox() {
    local busybox
    busybox=$(command -v busybox) || return 1
    ! ldd "$busybox" >/dev/null 2>&1
}

lab_install() {
    local as_root=""
    # shellcheck disable=SC2086
    set -- $1
    say "installing Debian packages: $*"
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || die "root is needed once: apt-get install $*"
        as_root=sudo
    fi
    if ! $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" >"$LAB_WORK/apt.log" 2>&1; then
        say "that failed; refreshing the package lists (apt-get update)"
        $as_root apt-get update -q >"$LAB_WORK/apt.log" 2>&1 || { cat "$LAB_WORK/apt.log" >&2; die "apt-get update failed"; }
        $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" >"$LAB_WORK/apt.log" 2>&1 ||
            { cat "$LAB_WORK/apt.log" >&2; die "apt-get install $* failed"; }
    fi
}

# --- kernels ---

lab_kernels() {
    local series got=0
    for series in $LAB_KERNELS; do
        if [ -s "$LAB_CACHE/kernel/$series/bzimage" ]; then got=1; continue; fi
        if lab_fetch_kernel "$series"; then got=1; else say "no Debian kernel $series here: tests that want it are skipped"; fi
    done
    [ $got = 1 ] || die "no guest kernel could be downloaded"
    rm -rf "$LAB_CACHE/apt"
}

# The newest package of a series as the metapackage names it, or by version where there is no such
# metapackage.
lab_kernel_package() {
    local series=$1 flavour=$2 meta name
    for meta in "linux-image-$series-$flavour" "linux-image-$flavour"; do
        name=$(lab_apt apt-cache depends "$meta" 2>/dev/null | sed -n 's/^ *Depends: *\(linux-image-'"${series//./\\.}"'\.[^ ]*\)$/\1/p' | tail -n 1)
        if [ -n "$name" ]; then echo "$name"; return; fi
    done
    lab_apt apt-cache pkgnames "linux-image-$series." 2>/dev/null |
        grep -E '^linux-image-[0-9.]+(-[0-9]+)?(\+deb[0-9]+(u[0-9]+)?)?(-[0-9]+)?-'"$flavour"'$' | sort -V | tail -n 1
}

# apt with the system's package lists, or with lists of our own (which need no root) once those have failed.
lab_apt() {
    local tool=$1
    shift
    if [ -e "$LAB_CACHE/apt/lists.conf" ]; then
        APT_CONFIG="$LAB_CACHE/apt/lists.conf" "$tool" "$@"
    else
        "$tool" -o APT::Sandbox::User=root "$@"
    fi
}

lab_own_package_lists() {
    mkdir -p "$LAB_CACHE/apt/state/lists/partial" "$LAB_CACHE/apt/cache/archives/partial"
    say "refreshing package lists of the lab's own (apt-get update)"
    cat >"$LAB_CACHE/apt/lists.conf" <<END
Dir::State "$LAB_CACHE/apt/state";
Dir::State::status "/var/lib/dpkg/status";
Dir::Cache "$LAB_CACHE/apt/cache";
APT::Sandbox::User "root";
Acquire::Languages "none";
END
    lab_apt apt-get update -q >"$LAB_WORK/apt.log" 2>&1 || { cat "$LAB_WORK/apt.log" >&2; return 1; }
}

# A kernel of a series and a flavour (cloud-amd64), into kernel/NAME (the series).
lab_fetch_kernel() {
    local series=$1 flavour=${2:-cloud-amd64} name=${3:-$1} package dir
    dir=$LAB_WORK/kernel-$name
    mkdir -p "$dir/deb"
    package=$(lab_kernel_package "$series" "$flavour")
    if [ -n "$package" ]; then
        say "downloading $package"
        (cd "$dir/deb" && lab_apt apt-get download -q "$package") >"$LAB_WORK/apt.log" 2>&1 || package=""
    fi
    if [ -z "$package" ]; then
        [ -e "$LAB_CACHE/apt/lists.conf" ] || lab_own_package_lists || return 1
        package=$(lab_kernel_package "$series" "$flavour")
        [ -n "$package" ] || return 1
        say "downloading $package"
        (cd "$dir/deb" && lab_apt apt-get download -q "$package") >"$LAB_WORK/apt.log" 2>&1 ||
            { cat "$LAB_WORK/apt.log" >&2; return 1; }
    fi
    say "unpacking $package"
    dpkg-deb -x "$dir"/deb/*.deb "$dir/root"
    lab_unpack_kernel "$dir/root" "$dir/ready"
    mkdir -p "$LAB_CACHE/kernel"
    rm -rf "${LAB_CACHE:?}/kernel/$name"
    mv "$dir/ready" "$LAB_CACHE/kernel/$name"
    rm -rf "$dir"
}

# From an unpacked package: bzimage, elf, version and a tree of modules with its modules.dep.
lab_unpack_kernel() {
    local root=$1 to=$2 version
    version=$(basename "$root"/boot/vmlinuz-*)
    version=${version#vmlinuz-}
    mkdir -p "$to"
    cp "$root/boot/vmlinuz-$version" "$to/bzimage"
    lab_extract_elf "$to/bzimage" "$to/elf"
    mkdir -p "$to/modules/lib"
    if [ -d "$root/usr/lib/modules" ]; then mv "$root/usr/lib/modules" "$to/modules/lib/modules"; else mv "$root/lib/modules" "$to/modules/lib/modules"; fi
    depmod -b "$to/modules" "$version"
    echo "$version" >"$to/version"
}

lab_number() { od -An -v "-tu$3" "-j$2" "-N$3" "$1" | tr -d ' '; }

# The kernel inside a bzImage: the setup header (boot protocol 2.08) says where the compressed payload lies.
# Its last four bytes are the unpacked size, which gzip carries itself; after the ELF image come relocations,
# which are cut off.
lab_extract_elf() {
    local bzimage=$1 elf=$2 sectors offset length start magic trailer=4 unpack end
    sectors=$(lab_number "$bzimage" 497 1)
    offset=$(lab_number "$bzimage" 584 4)
    length=$(lab_number "$bzimage" 588 4)
    start=$(((sectors + 1) * 512 + offset))
    magic=$(od -An -v -tx1 "-j$start" -N4 "$bzimage" | tr -d ' ')
    case $magic in
        28b52ffd) unpack="zstd -dcq" ;;
        02214c18) unpack="lz4 -dcq" ;;
        fd377a58) unpack="xz -dcq" ;;
        1f8b*) unpack="gzip -dc" trailer=0 ;;
        *) die "$bzimage: the kernel in it is compressed in an unknown way ($magic)" ;;
    esac
    tail -c "+$((start + 1))" "$bzimage" | head -c $((length - trailer)) | $unpack >"$elf.whole"
    [ "$(od -An -v -tx1 -N4 "$elf.whole" | tr -d ' ')" = 7f454c46 ] || die "$bzimage: no ELF image inside"
    end=$(($(lab_number "$elf.whole" 40 8) + $(lab_number "$elf.whole" 58 2) * $(lab_number "$elf.whole" 60 2)))
    head -c "$end" "$elf.whole" >"$elf"
    rm "$elf.whole"
}

# Copies modules and what they depend on, unpacked, to DIR/NN-name.ko: the shell's order of names is the order
# of loading.
lab_copy_modules() {
    local series=$1 to=$2 kernel=$LAB_CACHE/kernel/$1 version name file base n=10
    shift 2
    version=$(cat "$kernel/version")
    mkdir -p "$to"
    for name in "$@"; do
        modprobe -d "$kernel/modules" -S "$version" --show-depends "$name" 2>/dev/null | sed -n 's/^insmod \([^ ]*\).*/\1/p'
    done | awk '!seen[$0]++' | while read -r file; do
        base=${file##*/}
        base=${base%%.ko*}
        case $file in
            *.xz) xz -dc "$file" ;;
            *.zst) zstd -dcq "$file" ;;
            *.gz) gzip -dc "$file" ;;
            *) cat "$file" ;;
        esac >"$to/$n-$base.ko"
        n=$((n + 1))
    done
}

# --- images ---

# A newc archive of DIR, everything owned by root, links followed (a staging tree may be made of links).
lab_pack() { (cd "$1" && find -L . -mindepth 1 | sort | cpio -o -H newc -L -R 0:0 --quiet); }

# Puts a program and the libraries it needs into a staging tree, at the same paths.
lab_stage_program() {
    local tree=$1 program=$2 library
    lab_stage "$tree" "$program" "${3:-$program}"
    # Debugging information would double the archive; symbols stay, for backtraces.
    if [ "$(stat -L -c %s "$program")" -gt 4000000 ] && command -v strip >/dev/null; then
        if strip --strip-debug -o "$LAB_WORK/stripped.$$" "$program" 2>/dev/null; then mv -T "$LAB_WORK/stripped.$$" "$tree/${3:-$program}"; fi
    fi
    { ldd "$program" 2>/dev/null | grep -o '/[^ ]*' || true; } | while read -r library; do
        lab_stage "$tree" "$library" "$library"
    done
}

lab_stage() {
    mkdir -p "$1/${3%/*}"
    ln -sfn "$(readlink -f "$2")" "$1/$3"
}

lab_guest_images() {
    local series
    for series in $LAB_KERNELS; do
        [ -s "$LAB_CACHE/kernel/$series/bzimage" ] || continue
        say "making the guest's initramfs for $series"
        "$LAB_ROOT/resources/guest/make-initramfs" "$LAB_CACHE/kernel/$series" "$LAB_WORK/initramfs" "$LAB_WORK/drivers"
        mv "$LAB_WORK/initramfs" "$LAB_CACHE/kernel/$series/initramfs"
        mv "$LAB_WORK/drivers" "$LAB_CACHE/kernel/$series/drivers"
    done
}

lab_outer_images() {
    local series tree=$LAB_WORK/outer file
    say "making the lab's image"
    mkdir -p "$LAB_CACHE/image"
    for series in $LAB_KERNELS; do
        [ -s "$LAB_CACHE/kernel/$series/bzimage" ] || continue
        lab_outer_modules "$series" "$LAB_OUTER_MODULES"
        for file in bzimage elf initramfs drivers; do
            lab_stage "$tree" "$LAB_CACHE/kernel/$series/$file" "/lab/kernel/$series/$file"
        done
    done
    lab_stage "$tree" "$LAB_DIR/init" /init
    lab_stage "$tree" "$(command -v busybox)" /bin/busybox
    lab_stage_program "$tree" "$(command -v qemu-storage-daemon)" /usr/bin/qemu-storage-daemon
    lab_pack "$tree" | lz4 -l -9 -q >"$LAB_CACHE/image/base.new"
    (cd "$tree" && find . -type l | sed 's/^\.//') >"$LAB_CACHE/image/base.list"
    mv "$LAB_CACHE/image/base.new" "$LAB_CACHE/image/base"
    lab_qemu_image
}

# What the lab loads when this kernel is its own.
lab_outer_modules() {
    local series=$1 tree=$LAB_WORK/modules-tree
    rm -rf "$tree"
    # shellcheck disable=SC2086
    lab_copy_modules "$series" "$tree/lab/modules" $2
    # shellcheck disable=SC2086
    lab_copy_modules "$series" "$tree/lab/modules/extra" $LAB_OUTER_EXTRA_MODULES
    lab_pack "$tree" | lz4 -l -9 -q >"$LAB_CACHE/image/modules-$series.new"
    mv "$LAB_CACHE/image/modules-$series.new" "$LAB_CACHE/image/modules-$series"
}

# Debian's QEMU as a VMM to compare with: its own layer, for it doubles the image.
lab_qemu_image() {
    local tree=$LAB_WORK/qemu file
    lab_stage_program "$tree" "$(command -v qemu-system-x86_64)" /usr/bin/qemu-system-x86_64
    for file in bios-microvm.bin bios-256k.bin qboot.rom pvh.bin linuxboot_dma.bin kvmvapic.bin; do
        for dir in /usr/share/qemu /usr/share/seabios; do
            [ ! -e "$dir/$file" ] || lab_stage "$tree" "$dir/$file" "/usr/share/qemu/$file"
        done
    done
    lab_pack "$tree" | lz4 -l -9 -q >"$LAB_CACHE/image/qemu.new"
    mv "$LAB_CACHE/image/qemu.new" "$LAB_CACHE/image/qemu"
}

# --- questions ---

lab_kernel() {
    local path
    case ${2:-} in bzimage | elf) ;; *) die "which kernel? lab kernel 6.12|6.1 bzimage|elf" ;; esac
    path=$LAB_CACHE/kernel/$1/$2
    [ -s "$path" ] || die "no kernel $1 here"
    echo "$path"
}

lab_initramfs() {
    local path=$LAB_CACHE/kernel/${1:-}/initramfs
    [ -s "$path" ] || die "no initramfs for ${1:-an unnamed kernel} here"
    echo "$path"
}

# An ext4 image, without root and without a mount.
lab_disk() {
    [ $# -ge 2 ] || die "lab disk FILE SIZE [DIR]"
    rm -f "$1"
    truncate -s "$2" "$1"
    mke2fs -q -F -t ext4 -O ^metadata_csum_seed,^orphan_file -E root_owner=0:0,lazy_itable_init=1,hash_seed=00000000-0000-4000-8000-000000000000 \
        -L outboard ${3:+-d "$3"} "$1" "$2" 2>/dev/null ||
        mke2fs -q -F -t ext4 -E root_owner=0:0 -L outboard ${3:+-d "$3"} "$1" "$2"
}

# The generic kernel's files as variables that a cargo runner takes along, which it does not with the lab's
# own.
lab_generic_env() {
    local kernel=$LAB_CACHE/kernel/generic
    [ -e "$kernel/ready" ] || return 0
    echo "export OUTBOARD_GENERIC_KERNEL='$kernel/elf' OUTBOARD_GENERIC_INITRAMFS='$kernel/initramfs' OUTBOARD_GENERIC_DRIVERS='$kernel/drivers'"
}

# The variables that tests see, NAME=VALUE lines; $1 is the folder that holds the kernels.
lab_variables() {
    local series name
    for series in $LAB_KERNELS; do
        [ -s "$LAB_CACHE/kernel/$series/bzimage" ] || continue
        name=${series/./_}
        echo "OUTBOARD_KERNEL_${name}_BZIMAGE=$1/$series/bzimage"
        echo "OUTBOARD_KERNEL_${name}_ELF=$1/$series/elf"
        echo "OUTBOARD_GUEST_INITRAMFS_${name}=$1/$series/initramfs"
        echo "OUTBOARD_GUEST_DRIVERS_${name}=$1/$series/drivers"
    done
    echo "OUTBOARD_STORAGE_DAEMON=${2:-/usr/bin/qemu-storage-daemon}"
}

lab_env() { lab_variables "$LAB_CACHE/kernel" "$(command -v qemu-storage-daemon)" | sed "s/'/'\\\\''/g; s/=\(.*\)/='\1'/; s/^/export /"; }
