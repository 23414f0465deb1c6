//! Random numbers by `vhost-device-rng`, which knows no protocol feature but MQ. Needs a KVM that runs stock kernels: this
//! host's, or the lab's.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use outboard_tests::backends::{Backend, SCRIPT, assert_worked, guest, program};
use outboard_tests::scratch::Scratch;
use outboard_tests::{need, place};

#[test]
fn vhost_device_rng_gives_the_guest_the_bytes_of_its_source() {
    need!(place::kvm());
    let Some(rng) = program("vhost-device-rng") else { return };
    let scratch = Scratch::new();
    // Not random at all, so that the guest can tell where it comes from.
    let source = scratch.file("source", &vec![b'Z'; 4 << 20]);
    let arguments = [
        format!("--socket-path={}", scratch.path("rng").display()),
        format!("--rng-source={}", source.display()),
    ];
    // It numbers its sockets.
    let backend = Backend::start(&rng, scratch, "rng0", &arguments);
    let script = "grep -q virtio_rng /sys/class/misc/hw_random/rng_current || exit 1\n\
                  dd if=/dev/hwrng of=/tmp/got bs=256 count=256 iflag=fullblock 2>/dev/null || exit 2\n\
                  echo bytes=$(wc -c </tmp/got) others=$(tr -d Z </tmp/got | wc -c)";
    let launch = need!(guest("virtio-rng", script));
    let ended = launch.arg("--vhost-user").arg(format!("rng,socket={}", backend.socket().display())).start();
    let ended = ended.end(SCRIPT);
    assert_worked(&ended);
    assert_eq!((ended.field("bytes"), ended.field("others")), (65536, 0), "{ended}");
}
