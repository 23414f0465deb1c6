//! Random numbers by `vhost-device-rng`, which knows no protocol feature but MQ. Needs a KVM that runs stock
//! kernels: this host's, or the lab's.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use outboard_tests::backends::{Backend, SCRIPT, assert_worked, guest, program};
use outboard_tests::{need, place};

#[test]
fn vhost_device_rng_gives_the_guest_the_bytes_of_its_source() {
    need!(place::kvm());
    let Some(rng) = program("vhost-device-rng") else { return };
    let backend = Backend::rng(&rng, &vec![b'Z'; 4 << 20]);
    let script = "grep -q virtio_rng /sys/class/misc/hw_random/rng_current || exit 1\n\
                  dd if=/dev/hwrng of=/tmp/got bs=256 count=256 iflag=fullblock 2>/dev/null || exit 2\n\
                  echo bytes=$(wc -c </tmp/got) others=$(tr -d Z </tmp/got | wc -c)";
    let launch = need!(guest("virtio-rng", script));
    let ended = launch.arg("--vhost-user").arg(format!("rng,socket={}", backend.socket().display())).start();
    let ended = ended.end(SCRIPT);
    assert_worked(&ended);
    assert_eq!((ended.field("bytes"), ended.field("others")), (65536, 0), "{ended}");
}

#[test]
fn interrupts_of_a_pci_device_that_move_between_processors_lose_no_request() {
    need!(place::kvm());
    let Some(rng) = program("vhost-device-rng") else { return };
    let backend = Backend::rng(&rng, &vec![b'Z'; 4 << 20]);
    // Masked, given another message and unmasked, again and again, while requests run. (The interrupts of
    // disks are the kernel's own to move.)
    let script = "(dd if=/dev/hwrng of=/tmp/got bs=64 count=2000 iflag=fullblock 2>/dev/null; echo >/tmp/ended) &\n\
                  moves=0; set -- $(grep virtio0-input /proc/interrupts); irq=${1%:}\n\
                  while [ ! -e /tmp/ended ]; do moves=$((moves + 1))\n\
                  echo $((moves % 2 + 1)) >/proc/irq/$irq/smp_affinity || exit 1; done\n\
                  set -- $(grep virtio0-input /proc/interrupts); echo kind=$4 moves=$moves first=$2 second=$3\n\
                  echo bytes=$(wc -c </tmp/got) others=$(tr -d Z </tmp/got | wc -c)";
    let launch = need!(guest("virtio-rng", script)).args(["--cpus", "2"]);
    let device = format!("rng,transport=pci,socket={}", backend.socket().display());
    let ended = launch.arg("--vhost-user").arg(device).start().end(SCRIPT);
    assert_worked(&ended);
    assert_eq!((ended.field("bytes"), ended.field("others")), (128_000, 0), "{ended}");
    assert!(ended.console.contains("kind=PCI-MSIX-0000:00:01.0"), "{ended}");
    assert!(ended.field("moves") >= 20, "{ended}");
    assert!(ended.field("first") > 0 && ended.field("second") > 0, "both were interrupted\n{ended}");
}
