//! Our vfio-user servers under a client that others wrote: QEMU's `vfio-user-pci`, emulating, with a stock
//! guest. What does not work here is the servers' fault, not outboard's.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs::File;
use std::io::Read;
use std::process::Command;

use outboard_tests::backends::program;
use outboard_tests::vfio::{self, Server};

/// Seconds that a guest may take.
const LIMIT: &str = "120";
const MIB: usize = 1 << 20;

/// A guest with the server's device that runs a script, on an emulated machine; returns its console.
fn run(server: &Server, script: &str) -> Option<String> {
    let qemu = program("qemu-client")?;
    let (kernel, initramfs) = match vfio::files(Some(script)) {
        Ok(files) => files,
        Err(missing) => {
            missing.print(std::thread::current().name().unwrap_or("test"));
            return None;
        }
    };
    let folder = outboard_tests::scratch::Scratch::new();
    let initramfs = folder.file("initramfs", &initramfs);
    let device = format!(
        r#"{{"driver":"vfio-user-pci","socket":{{"type":"unix","path":"{}"}}}}"#,
        server.socket().display()
    );
    let done = Command::new("timeout")
        .args(["--kill-after=5", LIMIT])
        .arg(qemu)
        .args([
            "-M",
            "q35,accel=tcg,memory-backend=m",
            "-cpu",
            "max",
            "-m",
            "512",
            "-nodefaults",
            "-no-reboot",
        ])
        .args(["-object", "memory-backend-memfd,id=m,size=512M,share=on", "-display", "none"])
        .args([
            "-serial",
            "stdio",
            "-append",
            "console=ttyS0 quiet panic=-1 outboard.modules=uio_pci_generic",
        ])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs)
        .args(["-device", &device])
        .output()
        .unwrap();
    let console = String::from_utf8_lossy(&done.stdout).replace('\r', "");
    let log = String::from_utf8_lossy(&done.stderr);
    assert!(
        console.contains("@exit 0\n"),
        "{console}\n--- QEMU, {}\n{log}\n--- server\n{}",
        done.status,
        server.log()
    );
    Some(console)
}

#[test]
fn the_nvme_controller_serves_qemus_client() {
    let mut bytes = vec![0; 32 * MIB];
    File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
    for (doorbells, wire) in [("mapped", "plain"), ("trapped", "extended")] {
        let disk = [&bytes[..], &vec![0; 32 * MIB]].concat();
        let server = Server::nvme(&disk, &["--doorbells", doorbells, "--wire", wire]);
        let script = "f=$(function_of 0x0b0e); wait_for [ -b /dev/nvme0n1 ]
dd if=/dev/nvme0n1 of=/dev/nvme0n1 bs=1M count=32 seek=32 iflag=direct oflag=direct 2>/dev/null || exit 1
echo $f >/sys/bus/pci/drivers/nvme/unbind && echo $f >/sys/bus/pci/drivers/nvme/bind || exit 2
wait_for [ -b /dev/nvme0n1 ]; echo 1 >/sys/bus/pci/devices/$f/reset || exit 3
[ $(dd if=/dev/nvme0n1 bs=1M iflag=direct 2>/dev/null | wc -c) = $((64 << 20)) ]";
        if run(&server, script).is_none() {
            return;
        }
        let disk = server.disk();
        assert!(disk[..32 * MIB] == bytes && disk[32 * MIB..] == bytes, "{doorbells}");
    }
}

#[test]
fn the_engine_serves_qemus_client() {
    for wire in ["plain", "extended"] {
        let server = Server::engine(&["--wire", wire]);
        let script = r#"f=$(function_of 0x0b0f); d=/sys/bus/pci/devices/$f; echo 1 >$d/enable
export NO_PENDING_BITS=1
for what in dma areas "posted 1000" "reads 200" "irq msix 100" "irq msi 100"; do engine $f $what || exit 1; done
echo 1 >$d/reset || exit 2
echo 0 >$d/enable; echo uio_pci_generic >$d/driver_override; echo $f >/sys/bus/pci/drivers_probe; wait_for [ -e /dev/uio0 ]
engine $f irq intx 50"#;
        let Some(console) = run(&server, script) else { return };
        println!("{console}");
    }
}
