//! QEMU's own devices under stock drivers, served by QEMU over vfio-user. Needs a KVM that runs stock kernels: this host's, or
//! the lab's; and that QEMU.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs::File;
use std::io::Read;
use std::time::Duration;

use outboard_tests::guest::COMPLAINTS;
use outboard_tests::launch::{Ended, Launch};
use outboard_tests::place::Missing;
use outboard_tests::qemu_server::QemuServer;
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
    assert!(!ended.log.contains("warn: ") && !ended.log.contains("error: "), "the VMM complains\n{ended}");
    println!("{:?}, {} exits", ended.took, ended.stats().exits());
    ended
}

/// A shell script: the first half of a disk is copied to the second, past the guest's page cache, and compared.
fn copy(disk: &str, mib: usize) -> String {
    format!(
        r#"dd if={disk} of={disk} bs=1M count={mib} seek={mib} iflag=direct oflag=direct 2>/dev/null || exit 1
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
