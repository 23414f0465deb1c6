//! A screen by QEMU's vhost-user-gpu, whose display is played here: what the guest paints comes out of the
//! socket that `gpu-socket=` names. Needs a KVM that runs stock kernels: this host's, or the lab's; and
//! Debian's generic kernel.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use outboard_tests::backends::{Backend, SCRIPT, assert_worked, generic_guest, program};
use outboard_tests::display::{HEIGHT, WIDTH, display};
use outboard_tests::scratch::Scratch;
use outboard_tests::{need, place, wait};

#[test]
fn qemu_gpu_shows_what_the_guest_paints() {
    need!(place::kvm());
    let Some(gpu) = program("vhost-user-gpu") else { return };
    if place::in_lab() {
        // With it, it passes on where its picture is instead of the picture.
        drop(fs::remove_file("/dev/udmabuf"));
    }
    let scratch = Scratch::new();
    let seen = scratch.path("display");
    let screen = display(UnixListener::bind(&seen).unwrap());
    let arguments = [format!("--socket-path={}", scratch.path("gpu").display())];
    let backend = Backend::start(&gpu, scratch, "gpu", &arguments);
    let script = "for n in $(seq 100); do [ -e /dev/fb0 ] && break; usleep 100000; done\n\
                  cat /sys/class/graphics/fb0/virtual_size /sys/class/graphics/fb0/name || exit 1\n\
                  yes ABC. | tr -d '\\n' | dd of=/dev/fb0 bs=1280 count=200 iflag=fullblock 2>/dev/null || exit 2\n\
                  echo painted; read line";
    let launch = need!(generic_guest("virtio-gpu", script));
    let device = format!("gpu,socket={},gpu-socket={}", backend.socket().display(), seen.display());
    let mut vm = launch.arg("--vhost-user").arg(device).start();
    vm.expect("painted");
    // A cursor blinks somewhere.
    wait::until("the screen is painted", Duration::from_secs(20), || {
        let screen = screen.lock().unwrap();
        let painted = screen.pixels.iter().filter(|pixel| **pixel & 0xff_ffff == 0x43_4241).count();
        (painted > WIDTH * HEIGHT * 9 / 10).then_some(())
    });
    vm.send(b"\n");
    let ended = vm.end(SCRIPT);
    assert_worked(&ended);
    assert!(ended.console.contains("320,200"), "{ended}");
    println!("{} updates", screen.lock().unwrap().updates);
}
