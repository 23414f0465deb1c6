//! A window in guest-physical space, or in a BAR, through which a backend shows the guest a file of its own:
//! by the crate `vhost-user-backend`, in a stock guest. Needs a KVM that runs stock kernels: this host's, or
//! the lab's.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use outboard_tests::backends::{SCRIPT, assert_worked, guest};
use outboard_tests::gadget::{Gadget, PLACE, REGION, WORD};
use outboard_tests::{need, place};

#[test]
fn a_guest_reads_and_writes_the_file_that_its_backend_shows_it() {
    need!(place::kvm());
    let gadget = Gadget::start();
    // The window is at three quarters of what the processor addresses, 3 TiB at most.
    let script = format!(
        "bits=$(sed -n 's/^address sizes.*: \\([0-9]*\\) bits physical.*/\\1/p' /proc/cpuinfo | head -n 1)\n\
         [ $bits -lt 42 ] || bits=42\n\
         window=$(( (1 << bits) / 4 * 3 - {REGION} ))\n\
         dd if=/dev/hwrng of=/tmp/got bs=64 count=4 iflag=fullblock 2>/dev/null || exit 1\n\
         busybox devmem $(( window + {PLACE} + 8 )) 32 0x12345678 || exit 2\n\
         echo others=$(tr -d Z </tmp/got | wc -c) first=$(busybox devmem $(( window + {PLACE} )) 32) \
         outside=$(busybox devmem $window 32)",
    );
    let launch = need!(guest("virtio-rng", &script));
    let ended = launch.arg("--vhost-user").arg(format!("rng,socket={}", gadget.socket().display())).start();
    let ended = ended.end(SCRIPT);
    assert_worked(&ended);
    assert_eq!((ended.field("others"), ended.field("first")), (0, WORD.into()), "{ended}");
    assert_eq!(ended.field("outside"), 0xffff_ffff, "nothing is shown there\n{ended}");
    assert_eq!((gadget.mapped(), gadget.word(8)), (1, 0x1234_5678), "{ended}");
}

#[test]
fn a_guest_reads_and_writes_the_file_that_its_backend_shows_it_in_a_bar() {
    need!(place::kvm());
    let gadget = Gadget::start();
    let script = format!(
        "set -- $(sed -n 3p /sys/bus/pci/devices/0000:00:01.0/resource); window=$(( $1 ))\n\
         [ -e /sys/bus/pci/devices/0000:00:01.0/resource2_wc ] || exit 3\n\
         echo size=$(( $2 - $1 + 1 )) flags=$3\n\
         dd if=/dev/hwrng of=/tmp/got bs=64 count=4 iflag=fullblock 2>/dev/null || exit 1\n\
         busybox devmem $(( window + {PLACE} + 8 )) 32 0x12345678 || exit 2\n\
         echo others=$(tr -d Z </tmp/got | wc -c) first=$(busybox devmem $(( window + {PLACE} )) 32) \
         outside=$(busybox devmem $window 32)",
    );
    let launch = need!(guest("virtio-rng", &script));
    let device = format!("rng,transport=pci,socket={}", gadget.socket().display());
    let ended = launch.arg("--vhost-user").arg(device).start().end(SCRIPT);
    assert_worked(&ended);
    // Memory, 64 bits, prefetchable.
    assert_eq!((ended.field("size"), ended.field("flags") & 0x10_220f), (REGION, 0x10_220c), "{ended}");
    assert_eq!((ended.field("others"), ended.field("first")), (0, WORD.into()), "{ended}");
    assert_eq!(ended.field("outside"), 0xffff_ffff, "nothing is shown there\n{ended}");
    assert_eq!((gadget.mapped(), gadget.word(8)), (1, 0x1234_5678), "{ended}");
}
