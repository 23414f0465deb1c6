//! Many devices, and more than one machine: 16 disks of one process in a stock guest, and two machines each
//! with a disk, a file system, a source of random numbers and a vsock. Needs a KVM that runs stock kernels:
//! this host's, or the lab's.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::thread;

use outboard_tests::backends::{Backend, SCRIPT, echo, guest, program};
use outboard_tests::daemon::{SECTOR, StorageDaemon};
use outboard_tests::guest::{COMPLAINTS, Guest, Kernel};
use outboard_tests::launch::Ended;
use outboard_tests::scratch::Scratch;
use outboard_tests::{need, place};

const DISKS: usize = 16;

/// Disk n has 2048 + n sectors and begins with its number.
fn disks() -> Result<StorageDaemon, place::Missing> {
    let image = |n: usize| {
        let mut bytes = format!("disk={n}\n").into_bytes();
        bytes.resize((2048 + n) * SECTOR, 0);
        bytes
    };
    StorageDaemon::serving_all(&(0..DISKS).map(image).collect::<Vec<_>>())
}

fn assert_out_of_the_vmms_way(ended: &Ended, devices: usize) {
    for n in 0..devices {
        assert_eq!(
            ended.stats().number(&format!("/devices/{n}/requests_through_vmm")),
            0,
            "device {n}\n{ended}"
        );
    }
}

#[test]
fn a_stock_guest_uses_sixteen_disks_at_once() {
    need!(place::kvm());
    let kernel = need!(Kernel::usual());
    let daemon = need!(disks());
    let script = format!(
        "n=0; for d in /sys/block/vd*; do n=$((n + 1)); d=${{d##*/}}; \
         read -r line </dev/$d; echo $line size=$(cat /sys/block/$d/size); \
         (dd if=/dev/urandom of=/tmp/$d bs=4k count=40 && dd if=/tmp/$d of=/dev/$d bs=4k seek=8 oflag=direct && \
          dd if=/dev/$d of=/tmp/$d.back bs=4k skip=8 count=40 iflag=direct && cmp /tmp/$d /tmp/$d.back && \
          echo $d >>/tmp/good) 2>>/tmp/log & done; wait; echo disks=$n good=$(wc -l </tmp/good); \
         {COMPLAINTS} && exit 1; [ $(wc -l </tmp/good) = {DISKS} ] || {{ cat /tmp/log; exit 2; }}"
    );
    let launch = (0..DISKS).fold(kernel.script(&script), |launch, n| launch.disk(&daemon.socket_of(n)));
    let ended = launch.start().end(SCRIPT * 2).with_code(0);
    assert!(ended.console.contains("@exit 0"), "{ended}");
    assert_eq!((ended.field("disks"), ended.field("good")), (DISKS as u64, DISKS as u64), "{ended}");
    let console = ended.console.replace('\r', "");
    for n in 0..DISKS {
        assert!(console.contains(&format!("disk={n} size={}\n", 2048 + n)), "disk {n}\n{ended}");
    }
    assert_out_of_the_vmms_way(&ended, DISKS);
    println!("16 disks: {:?}, {} exits", ended.took, ended.stats().exits());
}

#[test]
fn of_sixteen_disks_a_killed_process_brings_all_back_to_a_stock_guest() {
    need!(place::kvm());
    let kernel = need!(Kernel::usual());
    let mut daemon = need!(disks());
    let launch =
        (0..DISKS).fold(kernel.guest(), |launch, n| launch.disk_with(&daemon.socket_of(n), "reconnect=0"));
    let mut guest = Guest::boot(launch);
    let load = guest.begin(
        "for d in /sys/block/vd*; do d=${d##*/}; (for round in 1 2 3; do \
         dd if=/dev/urandom of=/tmp/$d bs=4k count=40 && dd if=/tmp/$d of=/dev/$d bs=4k seek=8 oflag=direct && \
         dd if=/dev/$d of=/tmp/$d.back bs=4k skip=8 count=40 iflag=direct && cmp /tmp/$d /tmp/$d.back || exit; done; \
         echo $d >>/tmp/good) 2>/dev/null & done; wait; [ $(wc -l </tmp/good) = 16 ]",
    );
    let sockets = guest.vm().sockets();
    daemon.kill();
    guest.vm().expect_lost(sockets, DISKS);
    daemon.restart();
    let done = guest.finish(load, SCRIPT * 2);
    assert_eq!(done.status, 0, "{}", done.text);
    guest.assert_kernel_is_content();
    guest.last_words("poweroff -f");
    let ended = guest.into_vm().end(SCRIPT).with_code(0);
    for n in 0..DISKS {
        assert_eq!(ended.stats().number(&format!("/devices/{n}/recoveries")), 1, "disk {n}\n{ended}");
    }
    assert_out_of_the_vmms_way(&ended, DISKS);
}

/// The four devices of one machine, and their ends on the host.
struct Four {
    disk: StorageDaemon,
    fs: Backend,
    rng: Backend,
    vsock: Backend,
    shared: PathBuf,
    echo: thread::JoinHandle<u64>,
}

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 16;

fn four(machine: usize) -> Option<Four> {
    let (virtiofsd, rng, vsock) =
        (program("virtiofsd")?, program("vhost-device-rng")?, program("vhost-device-vsock")?);
    let mut image = format!("machine {machine}\n").into_bytes();
    image.resize(4 << 20, 0);
    let disk = StorageDaemon::serving(&image).ok()?;

    let scratch = Scratch::new();
    let shared = scratch.path("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("from-host"), format!("machine {machine}\n")).unwrap();
    let arguments = [
        format!("--socket-path={}", scratch.path("fs").display()),
        format!("--shared-dir={}", shared.display()),
        "--tag=work".into(),
        "--sandbox=none".into(),
    ];
    let fs = Backend::start(&virtiofsd, scratch, "fs", &arguments);

    let rng = Backend::rng(&rng, &vec![b'A' + u8::try_from(machine).unwrap(); 1 << 20]);

    let scratch = Scratch::new();
    let echo = echo(UnixListener::bind(scratch.path("host_1234")).unwrap());
    let arguments = [
        format!("--guest-cid={}", 3 + machine),
        format!("--socket={}", scratch.path("vsock").display()),
        format!("--uds-path={}", scratch.path("host").display()),
    ];
    let vsock = Backend::start(&vsock, scratch, "vsock", &arguments);
    Some(Four { disk, fs, rng, vsock, shared, echo })
}

/// All four at once, each until it is done.
fn script(machine: usize) -> String {
    let letter = char::from(b'A' + u8::try_from(machine).unwrap());
    format!(
        r#"mount -t virtiofs work /mnt || exit 1
read -r word </mnt/from-host && [ "$word" = "machine {machine}" ] || exit 2
read -r word </dev/vda && [ "$word" = "machine {machine}" ] || exit 3
disk() {{ dd if=/dev/urandom of=/tmp/in bs=4k count=200 && dd if=/tmp/in of=/dev/vda bs=4k seek=8 oflag=direct &&
    dd if=/dev/vda of=/tmp/out bs=4k skip=8 count=200 iflag=direct && cmp /tmp/in /tmp/out; }}
files() {{ for n in $(seq 100); do echo "file $n" >/mnt/$n || return 1; done
    for n in $(seq 100); do read -r line </mnt/$n && [ "$line" = "file $n" ] || return 1; done; }}
noise() {{ dd if=/dev/hwrng of=/tmp/noise bs=256 count=64 iflag=fullblock && [ $(tr -d {letter} </tmp/noise | wc -c) = 0 ] &&
    [ $(wc -c </tmp/noise) = 16384 ]; }}
talk() {{ guest vsock-connect 1234 {BLOCKS}; }}
for work in disk files noise talk; do ($work >>/tmp/log 2>&1 && echo $work >>/tmp/good) & done
wait
echo good=$(wc -l </tmp/good) $(grep blocks= /tmp/log)
[ $(wc -l </tmp/good) = 4 ] || {{ cat /tmp/good /tmp/log; exit 4; }}
umount /mnt"#
    )
}

#[test]
fn two_machines_with_four_kinds_of_devices_each_work_side_by_side() {
    need!(place::kvm());
    let mut machines = Vec::new();
    for machine in 0..2 {
        let Some(four) = four(machine) else { return };
        let launch = need!(guest("virtiofs,virtio-rng,vmw_vsock_virtio_transport", &script(machine)));
        let launch = launch.disk(&four.disk.socket());
        let launch = [("fs", &four.fs), ("rng", &four.rng), ("vsock", &four.vsock)].iter().fold(
            launch,
            |launch, (kind, backend)| {
                launch.arg("--vhost-user").arg(format!("{kind},socket={}", backend.socket().display()))
            },
        );
        machines.push((four, launch));
    }
    // All backends first, so that the machines run at the same time.
    let machines: Vec<_> = machines.into_iter().map(|(four, launch)| (four, launch.start())).collect();
    for (four, vm) in machines {
        let ended = vm.end(SCRIPT * 2).with_code(0);
        assert!(ended.console.contains("@exit 0"), "{ended}");
        assert_eq!((ended.field("good"), ended.field("blocks")), (4, BLOCKS), "{ended}");
        assert_out_of_the_vmms_way(&ended, 4);
        assert_eq!(four.echo.join().unwrap(), BLOCK * BLOCKS);
        for n in 1..=100 {
            assert_eq!(fs::read_to_string(four.shared.join(n.to_string())).unwrap(), format!("file {n}\n"));
        }
        println!("four devices: {:?}, {} exits", ended.took, ended.stats().exits());
    }
}
