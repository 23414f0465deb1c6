//! The sample `gpio-pci-idio-16` of libvfio-user, as it is, under the stock driver of the card that it plays.
//! Needs a KVM that runs stock kernels: this host's, or the lab's; and Debian's generic kernel.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use outboard_tests::backends::{SCRIPT, generic_guest};
use outboard_tests::{need, place, vfio};

#[test]
fn a_stock_driver_drives_a_sample_of_libvfio_user() {
    need!(place::kvm());
    let Some(gpio) = vfio::sample("gpio") else { return };
    // Lines 0 to 15 are outputs, in registers 0 and 4; 16 to 31 inputs, in 1 and 5. The driver names them.
    let script = format!(
        r#"{}f=$(function_of 0x0dc8); d=/sys/bus/pci/devices/$f
wait_for [ -e $d/driver ]
[ "$(basename "$(readlink $d/driver)")" = pci-idio-16 ] || exit 1
chip=$(ls -d $d/gpio/gpiochip* | head -n 1); base=$(cat $chip/base)
echo lines=$(cat $chip/ngpio)
cd /sys/class/gpio; for line in 3 8 16 31; do echo $((base + line)) >export || exit 2; done
echo 1 >OUT3/value && echo 1 >OUT8/value || exit 3
echo inputs=$(cat IIN0/value)$(cat IIN15/value)
for n in 1 2 3; do
    echo $f >$d/driver/unbind && [ ! -e $d/driver ] && echo $f >/sys/bus/pci/drivers/pci-idio-16/bind || exit 4
done"#,
        vfio::SHELL
    );
    let launch = need!(generic_guest("gpio-pci-idio-16", &script));
    let ended =
        launch.arg("--vfio-user").arg(gpio.device(",deadline=20000")).start().end(SCRIPT * 2).with_code(0);
    assert!(ended.console.contains("@exit 0"), "the script failed\n{ended}");
    assert_eq!(ended.field("lines"), 32, "{ended}");
    assert!(ended.console.contains("inputs=00"), "{ended}");
    let log = gpio.log();
    for access in ["wrote 0x8 to (0:1)", "wrote 0x1 to (0x4:1)", "read 0 from (0x1:1)", "read 0 from (0x5:1)"]
    {
        assert!(log.contains(access), "the server saw no {access}\n{log}");
    }
    assert_eq!(ended.stats().text("/devices/0/state"), "idle", "{ended}");
}
