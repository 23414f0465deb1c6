//! Sound by `vhost-device-sound`, which plays it to nobody. Needs a KVM that runs stock kernels: this host's,
//! or the lab's; and Debian's generic kernel.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;

use outboard_tests::backends::{Backend, SCRIPT, assert_worked, generic_guest, program};
use outboard_tests::scratch::Scratch;
use outboard_tests::{need, place};

#[test]
fn vhost_device_sound_takes_what_the_guest_plays() {
    need!(place::kvm());
    let Some(sound) = program("vhost-device-sound") else { return };
    let scratch = Scratch::new();
    let arguments = [format!("--socket={}", scratch.path("sound").display()), "--backend=null".into()];
    let backend = Backend::start(&sound, scratch, "sound", &arguments);
    // The kernel's old sound interface takes bytes from whoever writes them.
    let script = "grep VirtIO /proc/asound/cards || exit 1\n\
                  ls /proc/asound/card0\n\
                  dd if=/dev/zero of=/dev/dsp bs=4096 count=16 2>&1 || exit 2\n\
                  grep -c . /proc/asound/pcm";
    let launch = need!(generic_guest("virtio_snd,snd-pcm-oss", script));
    let device = format!("sound,socket={}", backend.socket().display());
    let ended = launch.arg("--vhost-user").arg(device).start().end(SCRIPT);
    assert_worked(&ended);
    assert!(ended.console.contains("16+0 records out"), "{ended}");
    let trace = fs::read_to_string(ended.files.path("trace")).unwrap();
    assert!(trace.contains("SET_VRING_NUM ring=2 num=64"), "it takes no larger queues\n{trace}");
}
