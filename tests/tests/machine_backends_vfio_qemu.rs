//! QEMU's own devices under stock drivers, served by QEMU over vfio-user. Needs a KVM that runs stock
//! kernels: this host's, or the lab's; and that QEMU.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs::File;
use std::io::Read;
use std::time::Duration;

use outboard_tests::backends::generic_guest;
use outboard_tests::guest::{COMPLAINTS, Guest};
use outboard_tests::launch::{Ended, Launch};
use outboard_tests::place::Missing;
use outboard_tests::qemu_server::QemuServer;
use outboard_tests::scratch::Scratch;
use outboard_tests::vfio::SHELL;
use outboard_tests::{need, place, vfio};

const MIB: usize = 1 << 20;
const SCRIPT: Duration = Duration::from_secs(60);

fn ready() -> Result<(), Missing> {
    place::kvm()?;
    vfio::guest("", "", None).map(|_| ())
}

fn random(size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
    bytes
}

/// With a deadline for a busy lab.
fn with(launch: Launch, server: &QemuServer, device: usize) -> Launch {
    launch.arg("--vfio-user").arg(server.device(device, ",deadline=20000"))
}

fn finish(launch: Launch) -> Ended {
    let ended = launch.start().end(SCRIPT).with_code(0);
    assert!(ended.console.replace('\r', "").contains("@exit 0\n"), "the script failed\n{ended}");
    // QEMU offers MSI-X or MSI, and not both of a device that has both.
    let complains =
        |line: &str| (line.contains("warn: ") || line.contains("error: ")) && !line.contains("MSI is hidden");
    let complains = ended.log.lines().any(complains);
    assert!(!complains, "the VMM complains\n{ended}");
    println!("{:?}, {} exits", ended.took, ended.stats().exits());
    ended
}

/// A shell script: the first half of a disk is copied to the second, past the guest's page cache, and
/// compared.
fn copy(disk: &str, mib: usize) -> String {
    format!(
        r#"dd if={disk} of={disk} bs=1M count={mib} seek={mib} iflag=direct oflag=direct 2>/tmp/dd || {{ cat /tmp/dd; dmesg | tail -n 40; exit 1; }}
a=$(dd if={disk} bs=256k count=$(({mib} * 4)) iflag=direct 2>/dev/null | md5sum)
b=$(dd if={disk} bs=1M count={mib} skip={mib} iflag=direct 2>/dev/null | md5sum)
[ "$a" = "$b" ] || exit 2
"#
    )
}

fn assert_copied(server: &QemuServer, bytes: &[u8], ended: &Ended) {
    let disk = server.disk();
    assert!(disk[..bytes.len()] == *bytes, "the guest's reads have written\n{ended}");
    assert!(disk[bytes.len()..] == *bytes, "the disk differs from what the guest wrote\n{ended}");
}

#[test]
fn the_stock_nvme_driver_works_with_qemus_controller() {
    need!(ready());
    let bytes = random(16 * MIB);
    let disk = [&bytes[..], &vec![0; 16 * MIB]].concat();
    let Some(server) = QemuServer::with_disk(&disk, &["-device nvme,id=nvme,serial=q,drive=disk"]) else {
        return;
    };
    let script = format!(
        r#"f=$(function_of 0x0010); d=/sys/bus/pci/devices/$f; wait_for [ -b /dev/nvme0n1 ]
{copy}
count() {{ grep "nvme0q1\$" /proc/interrupts | awk '{{ n += $2 }} END {{ print n }}'; }}
before=$(count); dd if=/dev/nvme0n1 of=/dev/null bs=4k count=100 iflag=direct 2>/dev/null || exit 3
echo interrupts=$(($(count) - before)) vectors=$(ls $d/msi_irqs | wc -l)
want=$(dd if=/dev/nvme0n1 bs=64k count=4 iflag=direct 2>/dev/null | md5sum)
cd /sys/bus/pci/drivers/nvme
for round in 1 2 3; do
    echo $f >unbind && [ ! -e /dev/nvme0 ] && echo $f >bind || exit 4
    wait_for [ -b /dev/nvme0n1 ]
    [ "$(dd if=/dev/nvme0n1 bs=64k count=4 iflag=direct 2>/dev/null | md5sum)" = "$want" ] || exit 5
    echo 1 >$d/reset || exit 6
    [ "$(dd if=/dev/nvme0n1 bs=64k count=4 iflag=direct 2>/dev/null | md5sum)" = "$want" ] || exit 7
done
{COMPLAINTS} && exit 8; true"#,
        copy = copy("/dev/nvme0n1", 16)
    );
    let launch = vfio::guest("", "", Some(&script)).unwrap();
    let ended = finish(with(launch, &server, 0));
    assert_copied(&server, &bytes, &ended);
    assert!((100..=130).contains(&ended.field("interrupts")), "{ended}");
    assert_eq!(ended.field("vectors"), 2, "a queue and the administrator's\n{ended}");
}

/// Exits, trapped reads, trapped writes and answers waited for, of each of 1 000 requests.
fn cost(more: &str) -> Option<[f64; 4]> {
    let run = |requests: u32| {
        let server = QemuServer::with_disk(&random(16 * MIB), &["-device nvme,id=nvme,serial=q,drive=disk"])?;
        // Both runs print the same number of characters.
        let script = format!(
            "wait_for [ -b /dev/nvme0n1 ]; dd if=/dev/nvme0n1 of=/dev/null bs=4k count={requests:04} iflag=direct 2>/dev/null"
        );
        let launch = vfio::guest("", "", Some(&script)).unwrap();
        let ended = finish(launch.arg("--vfio-user").arg(server.device(0, more)));
        let stats = ended.stats();
        let of_device = |what: &str| stats.number(&format!("/devices/0/{what}"));
        let [reads, writes, waits] = ["pci/bar_reads/0", "pci/bar_writes/0", "peer/waits"].map(of_device);
        Some([stats.exits(), reads, writes, waits])
    };
    let (few, many) = (run(1)?, run(1001)?);
    let more = many
        .into_iter()
        .zip(few)
        .map(|(many, few)| (i64::try_from(many).unwrap(), i64::try_from(few).unwrap()));
    let each: Vec<_> =
        more.map(|(many, few)| f64::from(i32::try_from(many - few).unwrap()) / 1000.0).collect();
    println!("a request: exits, trapped reads, trapped writes, answers waited for: {each:?}");
    Some(each.try_into().unwrap())
}

#[test]
fn what_a_request_to_qemus_controller_costs() {
    need!(ready());
    // QEMU has no eventfds for doorbells. That of the submission queue is rung, and answered or posted; that
    // of the completion queue is a number in memory (its controller has the Doorbell Buffer Config command).
    for (more, waits) in [(",deadline=20000", 1.0), (",deadline=20000,posted-writes=on", 0.0)] {
        let Some([exits, reads, writes, waited]) = cost(more) else { return };
        assert!(reads.abs() < 0.1 && (writes - 1.0).abs() < 0.2, "{reads} reads, {writes} writes");
        assert!((waited - waits).abs() < 0.2 && exits < 1.5, "{more}: {waited} answers, {exits} exits");
    }
}

#[test]
fn qemus_controller_is_there_after_every_reboot() {
    need!(ready());
    let Some(server) =
        QemuServer::with_disk(&vec![0; 4 * MIB], &["-device nvme,id=nvme,serial=q,drive=disk"])
    else {
        return;
    };
    // The disk counts the boots.
    let script = format!(
        r#"wait_for [ -b /dev/nvme0n1 ]
n=$(dd if=/dev/nvme0n1 bs=512 count=1 iflag=direct 2>/dev/null | tr -d '\0')
n=$((${{n:-0}} + 1))
echo $n | dd of=/dev/nvme0n1 bs=512 count=1 conv=sync oflag=direct 2>/dev/null || exit 1
dd if=/dev/urandom of=/dev/nvme0n1 bs=64k seek=1 count=10 oflag=direct 2>/dev/null || exit 2
{COMPLAINTS} && exit 3
[ $n -gt 5 ] || reboot -f
echo boots=$n"#
    );
    let launch = with(vfio::guest("", "", Some(&script)).unwrap(), &server, 0);
    let ended = launch.start().end(SCRIPT * 2).with_code(0);
    assert_eq!(ended.field("boots"), 6, "{ended}");
    assert!(ended.console.replace('\r', "").contains("@exit 0\n"), "{ended}");
}

#[test]
fn qemu_killed_under_load_leaves_a_machine_that_lives() {
    need!(ready());
    let Some(mut server) =
        QemuServer::with_disk(&vec![0; 64 * MIB], &["-device nvme,id=nvme,serial=q,drive=disk"])
    else {
        return;
    };
    const IMPATIENT: &str = "nvme_core.io_timeout=3 nvme_core.admin_timeout=3";
    let launch = vfio::guest("", IMPATIENT, None).unwrap().args(["--cpus", "2"]);
    let mut guest = Guest::boot(with(launch, &server, 0));
    guest.run(
        ". /functions; wait_for [ -b /dev/nvme0n1 ]; \
         (while dd if=/dev/nvme0n1 of=/dev/null bs=64k iflag=direct 2>/dev/null; do :; done) >/dev/null 2>&1 </dev/null & \
         sleep 1",
    );
    server.kill();
    let gone = guest.exec(
        "for n in $(seq 400); do \
             [ \"$(dd if=/dev/nvme0n1 bs=4k count=1 iflag=direct 2>/dev/null | wc -c)\" = 4096 ] || exit 0; usleep 50000; \
         done; exit 9",
        SCRIPT,
    );
    assert_eq!(gone.status, 0, "the disk still answers: {}", gone.text);
    guest.last_words("poweroff -f");
    let ended = guest.into_vm().end(SCRIPT).with_code(0);
    assert_eq!(ended.stats().text("/end"), "power-off");
    assert_eq!(ended.stats().text("/devices/0/state"), "broken", "{ended}");
}

/// A disk behind an AHCI controller, read and written; several at a time.
fn ahci(words: &str, kind: &str) {
    need!(ready());
    let bytes = random(2 * MIB);
    let disk = [&bytes[..], &vec![0; 2 * MIB]].concat();
    let devices = ["-device ich9-ahci,id=ahci", "-device ide-hd,drive=disk,bus=ahci.0"];
    let Some(server) = QemuServer::with_disk(&disk, &devices) else { return };
    let script = format!(
        r#"wait_for [ -b /dev/sda ]; echo found=$(cut -d. -f1 /proc/uptime)
{copy}
echo copied=$(cut -d. -f1 /proc/uptime)
for n in 1 2 3 4; do
    dd if=/dev/sda of=/dev/null bs=4k count=50 skip=$((n * 100)) iflag=direct 2>/dev/null || echo bad &
done | grep -q bad && exit 3
wait; echo read=$(cut -d. -f1 /proc/uptime)
grep ahci /proc/interrupts; grep ahci /proc/interrupts | grep -q {kind} || exit 4
{COMPLAINTS} && exit 8; true"#,
        copy = copy("/dev/sda", 2)
    );
    let launch = vfio::guest("ahci,sd_mod", words, Some(&script)).unwrap().args(["--cpus", "2"]);
    let ended = finish(with(launch, &server, 0));
    let [found, copied, read] = ["found", "copied", "read"].map(|what| ended.field(what));
    println!("found after {found} s, copied after {copied} s, read after {read} s");
    assert_copied(&server, &bytes, &ended);
}

#[test]
fn the_stock_ahci_driver_works_with_qemus_controller_by_msi() {
    ahci("", "MSI");
}

#[test]
fn the_stock_ahci_driver_works_with_qemus_controller_by_its_pin() {
    ahci("pci=nomsi", "IO-APIC");
}

/// Two network cards of one QEMU on one hub, each in a network of its own of the guest's, which has `guest`'s
/// kernel.
fn network(model: &str, guest: impl FnOnce(&str) -> Launch) {
    let [one, two] = [("one", 1), ("two", 2)].map(|(name, number)| {
        format!("-device {model},id={name},netdev=net{number},mac=52:54:00:00:00:0{number},romfile=")
    });
    let hub = ["-netdev hubport,hubid=0,id=net1", "-netdev hubport,hubid=0,id=net2"];
    let Some(server) = QemuServer::start(Scratch::new(), &[&hub[..], &[&one, &two]].concat()) else { return };
    let script = format!(
        r#"{SHELL}wait_for [ -e /sys/class/net/eth1 ]
unshare -n sleep 1000 & other=$!
apart() {{ [ $(readlink /proc/$other/ns/net) != $(readlink /proc/self/ns/net) ]; }}
wait_for apart
ip link set eth1 netns $other || exit 1
there() {{ nsenter -t $other -n "$@"; }}
ip addr add 10.0.0.1/24 dev eth0; ip link set eth0 up
there ip addr add 10.0.0.2/24 dev eth1; there ip link set eth1 up
wait_for ping -c 1 -W 1 10.0.0.2 >/dev/null
ping -c 50 -i 0.02 -s 1400 10.0.0.2 | grep -q "50 packets received" || exit 2
dd if=/dev/urandom of=/tmp/sent bs=64k count=4 2>/dev/null
mkfifo /tmp/open; exec 9<>/tmp/open
there nc -l -p 7 <&9 >/tmp/got & n=$!
listens() {{ there cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | grep -q ":0007 .* 0A "; }}
wait_for listens
nc 10.0.0.2 7 </tmp/sent; wait $n
cmp /tmp/sent /tmp/got || exit 3
grep -E "eth[01]" /proc/interrupts; kill $other
{COMPLAINTS} && exit 8; true"#
    );
    finish(with(with(guest(&script), &server, 0), &server, 1));
}

#[test]
fn two_network_cards_of_qemu_reach_each_other() {
    need!(ready());
    network("vmxnet3", |script| vfio::guest("vmxnet3", "", Some(script)).unwrap());
}

#[test]
fn two_intel_cards_of_qemu_reach_each_other() {
    need!(ready());
    need!(generic_guest("", ""));
    network("e1000e", |script| generic_guest("e1000e", script).unwrap());
}

#[test]
fn a_usb_disk_behind_qemus_controller_is_read_and_written() {
    need!(ready());
    need!(generic_guest("", ""));
    let bytes = random(4 * MIB);
    let disk = [&bytes[..], &vec![0; 4 * MIB]].concat();
    let devices = ["-device qemu-xhci,id=usb", "-device usb-storage,drive=disk,bus=usb.0"];
    let Some(server) = QemuServer::with_disk(&disk, &devices) else { return };
    let script =
        format!("{SHELL}wait_for [ -b /dev/sda ]\n{}{COMPLAINTS} && exit 8; true", copy("/dev/sda", 4));
    let launch = generic_guest("xhci_pci,usb_storage,sd_mod", &script).unwrap();
    let ended = finish(with(launch, &server, 0));
    assert_copied(&server, &bytes, &ended);
}

/// Without its DMA translated (`iommu_platform`) a virtio device of QEMU looks for its rings in QEMU's own
/// memory.
#[test]
fn a_virtio_disk_of_qemu_works_over_vfio_user() {
    need!(ready());
    let bytes = random(16 * MIB);
    let disk = [&bytes[..], &vec![0; 16 * MIB]].concat();
    let Some(server) = QemuServer::with_disk(
        &disk,
        &["-device virtio-blk-pci,id=blk,drive=disk,disable-legacy=on,iommu_platform=on"],
    ) else {
        return;
    };
    let script = format!("wait_for [ -b /dev/vda ]\n{}{COMPLAINTS} && exit 8; true", copy("/dev/vda", 16));
    let ended = finish(with(vfio::guest("", "", Some(&script)).unwrap(), &server, 0));
    assert_copied(&server, &bytes, &ended);
}
