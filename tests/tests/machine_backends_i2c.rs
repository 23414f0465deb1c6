//! An I2C bus by `vhost-device-i2c`, on the bus that Linux's `i2c-stub` plays. Needs the generic kernel in
//! the lab (`OUTBOARD_LAB_KERNEL=generic`), and the modules that `tests/backends/fetch` makes.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::process::Command;

use outboard_tests::backends::{Backend, SCRIPT, assert_worked, guest_with_modules, load, module, program};
use outboard_tests::scratch::Scratch;
use outboard_tests::{need, place};

/// The bus that `i2c-stub` plays.
const BUS: &str = "SMBus stub driver";

/// A word that a command of busybox tells, as `0x12`.
fn told(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn vhost_device_i2c_reads_and_writes_registers_for_the_stock_driver() {
    need!(place::kvm());
    let Some(i2c) = program("vhost-device-i2c") else { return };
    let (Some(dev), Some(stub), Some(driver)) = (module("i2c-dev"), module("i2c-stub"), module("i2c-virtio"))
    else {
        return;
    };
    need!(load(&dev, &[]));
    // Two chips, of which the guest gets the first.
    need!(load(&stub, &["chip_addr=0x50,0x51"]));
    let bus = told(&format!("cd /sys/bus/i2c/devices; grep -lx '{BUS}' */name | cut -d/ -f1 | cut -d- -f2"));
    told(&format!("i2cset -y {bus} 0x50 0x20 0x77 b && i2cset -y {bus} 0x51 0x20 0x66 b"));
    let scratch = Scratch::new();
    let arguments =
        [format!("--socket-path={}", scratch.path("i2c").display()), format!("--device-list={BUS}:{}", 0x50)];
    // It numbers its sockets.
    let backend = Backend::start(&i2c, scratch, "i2c0", &arguments);
    let script = "cat /sys/bus/i2c/devices/i2c-0/name
        echo found=$(i2cget -y 0 0x50 0x20 b)
        i2cset -y 0 0x50 0x10 0x42 b || exit 1
        i2cset -y 0 0x50 0x30 0xbeef w || exit 2
        echo byte=$(i2cget -y 0 0x50 0x10 b) word=$(i2cget -y 0 0x50 0x30 w)
        i2cget -y 0 0x51 0x20 b && exit 3
        n=0; while [ $n -lt 30 ]; do
            i2cset -y 0 0x50 0x40 $n b || exit 4
            [ $(($(i2cget -y 0 0x50 0x40 b))) = $n ] || exit 5
            n=$((n + 1))
        done
        echo turns=$n";
    for transport in ["mmio", "pci"] {
        let launch = need!(guest_with_modules(&[dev.clone(), driver.clone()], "", script));
        let device = format!("i2c,transport={transport},socket={}", backend.socket().display());
        let ended = launch.arg("--vhost-user").arg(device).start().end(SCRIPT * 2);
        assert_worked(&ended);
        assert!(ended.console.contains("i2c_virtio at virtio bus 0"), "{ended}");
        assert_eq!((ended.field("found"), ended.field("turns")), (0x77, 30), "{ended}");
        assert_eq!((ended.field("byte"), ended.field("word")), (0x42, 0xbeef), "{ended}");
        assert_eq!(told(&format!("i2cget -y {bus} 0x50 0x10 b")), "0x42");
        assert_eq!(told(&format!("i2cget -y {bus} 0x50 0x30 w")), "0xbeef");
        told(&format!("i2cset -y {bus} 0x50 0x10 0 b && i2cset -y {bus} 0x50 0x30 0 w"));
        let trace = fs::read_to_string(ended.files.path("trace")).unwrap();
        assert!(!trace.contains("need_reply"), "it has no REPLY_ACK\n{trace}");
    }
}
