//! A SCSI disk by `vhost-device-scsi`, which has no REPLY_ACK and does not write. Needs a KVM that runs stock
//! kernels: this host's, or the lab's.

use std::process::Command;

use outboard_tests::backends::{Backend, SCRIPT, assert_worked, guest, program};
use outboard_tests::daemon::pattern;
use outboard_tests::scratch::Scratch;
use outboard_tests::{need, place};

const SECTORS: usize = 8192;

#[test]
fn vhost_device_scsi_serves_a_disk_that_reads_as_the_image() {
    need!(place::kvm());
    let Some(scsi) = program("vhost-device-scsi") else { return };
    let scratch = Scratch::new();
    let bytes: Vec<u8> = (0..SECTORS * 512).map(|byte| pattern(byte / 512)).collect();
    let image = scratch.file("disk.img", &bytes);
    let arguments = [
        format!("--socket-path={}", scratch.path("scsi").display()),
        "--read-only".into(),
        image.display().to_string(),
    ];
    let backend = Backend::start(&scsi, scratch, "scsi", &arguments);
    // The guest reads all of it, then here and there, and finds that it cannot write.
    let script = r#"for n in $(seq 100); do [ -b /dev/sda ] && break; usleep 100000; done
echo sectors=$(cat /sys/block/sda/size) readonly=$(cat /sys/block/sda/ro)
dd if=/dev/sda bs=64k iflag=direct 2>/dev/null | md5sum || exit 1
for n in $(seq 50); do dd if=/dev/sda of=/dev/null bs=4k count=4 skip=$((n * 20)) iflag=direct 2>/dev/null || exit 2; done
! dd if=/dev/zero of=/dev/sda bs=4k count=1 2>/dev/null || exit 3"#;
    let launch = need!(guest("virtio_scsi,sd_mod", script));
    let device = format!("scsi,socket={}", backend.socket().display());
    let ended = launch.arg("--vhost-user").arg(device).start().end(SCRIPT * 2);
    assert_worked(&ended);
    let sum = Command::new("md5sum").arg(backend.scratch().path("disk.img")).output().unwrap().stdout;
    let sum = String::from_utf8(sum).unwrap();
    assert!(ended.console.contains(sum.split(' ').next().unwrap()), "{sum}\n{ended}");
    assert_eq!((ended.field("sectors"), ended.field("readonly")), (SECTORS as u64, 1), "{ended}");
}
