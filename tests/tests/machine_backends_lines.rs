//! Lines (gpio) by `vhost-device-gpio`, on those that Linux's `gpio-sim` plays. Needs the generic kernel in
//! the lab (`OUTBOARD_LAB_KERNEL=generic`), and the modules that `tests/backends/fetch` makes.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use outboard_tests::backends::{
    Backend, SCRIPT, assert_worked, guest_with_modules, load, module, optional_program,
};
use outboard_tests::scratch::Scratch;
use outboard_tests::{need, place};

const EDGES: u64 = 6;

/// What the guest reads from a line with this value. The backend gives the place of a word in a list of two,
/// ACTIVE and INACTIVE, for a value; what the guest sets arrives as it is.
fn read(value: u64) -> u64 {
    1 - value
}

/// Four lines that are not there, of which three have names.
struct Lines {
    chip: PathBuf,
    number: String,
}

impl Lines {
    fn new() -> Self {
        let configured = "mount -t configfs configfs /sys/kernel/config 2>/dev/null
            cd /sys/kernel/config/gpio-sim && mkdir -p lab/bank && cd lab && echo 4 >bank/num_lines || exit 1
            for line in 0:out 1:in 3:bell; do
                mkdir bank/line${line%:*} && echo ${line#*:} >bank/line${line%:*}/name || exit 2
            done
            echo 1 >live && echo /sys/devices/platform/$(cat dev_name)/$(cat bank/chip_name)";
        let made = Command::new("sh").args(["-c", configured]).output().unwrap();
        assert!(made.status.success(), "{made:?}");
        let chip = PathBuf::from(String::from_utf8(made.stdout).unwrap().trim());
        let name = chip.file_name().unwrap().to_str().unwrap().to_owned();
        Self { chip, number: name.strip_prefix("gpiochip").unwrap().to_owned() }
    }

    fn file(&self, line: u32, what: &str) -> PathBuf {
        self.chip.join(format!("sim_gpio{line}")).join(what)
    }

    fn pull(&self, line: u32, up: u64) {
        fs::write(self.file(line, "pull"), if up == 1 { "pull-up" } else { "pull-down" }).unwrap();
    }

    fn value(&self, line: u32) -> String {
        fs::read_to_string(self.file(line, "value")).unwrap().trim().to_owned()
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        let removed =
            "cd /sys/kernel/config/gpio-sim && echo 0 >lab/live && rmdir lab/bank/line* lab/bank lab";
        let status = Command::new("sh").args(["-c", removed]).status();
        assert!(std::thread::panicking() || status.unwrap().success(), "the lines stay");
    }
}

#[test]
fn vhost_device_gpio_sets_reads_and_interrupts_for_the_stock_driver() {
    need!(place::kvm());
    let Some(gpio) = optional_program("vhost-device-gpio") else { return };
    let (Some(configfs), Some(sim), Some(driver)) =
        (module("configfs"), module("gpio-sim"), module("gpio-virtio"))
    else {
        return;
    };
    need!(load(&configfs, &[]));
    need!(load(&sim, &[]));
    let lines = Lines::new();
    assert!(Path::new("/dev").join(lines.chip.file_name().unwrap()).exists());
    for transport in ["mmio", "pci"] {
        let scratch = Scratch::new();
        let arguments = [
            format!("--socket-path={}", scratch.path("gpio").display()),
            format!("--device-list={}", lines.number),
        ];
        // It numbers its sockets.
        let backend = Backend::start(&gpio, scratch, "gpio0", &arguments);
        // The guest's kernel knows the lines by their names.
        let script = format!(
            "chip=$(ls -d /sys/class/gpio/gpiochip* | head -n 1); base=$(cat $chip/base); echo lines=$(cat $chip/ngpio)
             cd /sys/class/gpio; for line in 0 1 3; do echo $((base + line)) >export || exit 1; done
             echo high >out/direction && echo in >in/direction && echo in=$(cat in/value) || exit 2
             echo high.
             read -r go </dev/console; [ \"$go\" = go ] || exit 3
             echo 0 >out/value && echo later=$(cat in/value) || exit 4
             echo in >bell/direction && echo both >bell/edge || exit 5
             guest edges bell/value {EDGES} || exit 6
             echo none >bell/edge && echo $((base + 3)) >unexport || exit 7"
        );
        lines.pull(1, 1);
        lines.pull(3, 0);
        let launch = need!(guest_with_modules(std::slice::from_ref(&driver), "", &script));
        let device = format!("gpio,transport={transport},socket={}", backend.socket().display());
        let mut vm = launch.arg("--vhost-user").arg(device).start();
        vm.expect("high.");
        assert_eq!(lines.value(0), "1");
        lines.pull(1, 0);
        vm.send(b"go\n");
        vm.expect("waiting");
        assert_eq!(lines.value(0), "0");
        for edge in 1..=EDGES {
            lines.pull(3, edge % 2);
            vm.expect(&format!("edge {edge} to {}.", read(edge % 2)));
        }
        let ended = vm.end(SCRIPT);
        assert_worked(&ended);
        assert_eq!((ended.field("lines"), ended.field("edges")), (4, EDGES), "{ended}");
        assert_eq!((ended.field("in"), ended.field("later")), (read(1), read(0)), "{ended}");
    }
}
