//! What a stock guest does with virtio-pci devices: the PCI host is enumerated, its devices are driven
//! without exits, and drivers come and go. (That interrupts move is tested in machine_backends_rng: those of
//! disks are the kernel's own.) Needs a KVM that runs stock kernels: this host's, or the lab's.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::time::Duration;

use outboard_tests::daemon::StorageDaemon;
use outboard_tests::guest::{COMPLAINTS, Form, Kernel};
use outboard_tests::launch::{Ended, Launch};
use outboard_tests::{need, place};

const MIB: usize = 1 << 20;
/// From the start to the end of a machine with a script, on a quiet host.
const SCRIPT: Duration = Duration::from_secs(60);

fn finish(launch: Launch) -> Ended {
    let ended = launch.start().end(SCRIPT).with_code(0);
    assert!(ended.console.contains("@exit 0"), "the script failed\n{ended}");
    assert!(!ended.log.contains("warn: ") && !ended.log.contains("error: "), "{ended}");
    println!("{:?}, {} exits", ended.took, ended.stats().exits());
    ended
}

trait OnPci {
    fn on_pci(self, disk: &StorageDaemon, keys: &str) -> Self;
}

impl OnPci for Launch {
    fn on_pci(self, disk: &StorageDaemon, keys: &str) -> Self {
        self.disk_with(&disk.socket(), &format!("transport=pci{keys}"))
    }
}

/// What `lspci` would show, and the interrupts.
const SHOWN: &str = r#"cd /sys/bus/pci/devices/0000:00:01.0 && read -r vendor <vendor && read -r device <device
read -r first last flags <resource
echo vendor=$vendor device=$device bar=$first flags=$flags
echo msix=$(ls msi_irqs | wc -l) bound=$(basename $(readlink driver)) pages=$((last / 4096 - first / 4096 + 1))
grep -q PCI-MSI /proc/interrupts && dmesg | grep -c "ACPI motherboard resource" | sed s/^/ecam=/"#;

/// Both stock kernels enumerate the bus, bind the driver and read and write without an exit.
fn zero_exits(series: &str) {
    need!(place::kvm());
    let kernel = need!(Kernel::stock(series, Form::Elf));
    let disk = need!(StorageDaemon::start(16 * MIB));
    // Both runs print the same number of characters.
    let run = |requests: u32| {
        let script = format!(
            "{SHOWN}\ndd if=/dev/vda of=/dev/null bs=4k count={requests:04} iflag=direct 2>/dev/null && \
             dd if=/dev/zero of=/dev/vda bs=4k count={requests:04} oflag=direct 2>/dev/null && \
             set -- $(cat /sys/block/vda/stat) && echo reads=$1 writes=$5"
        );
        finish(kernel.script(&script).on_pci(&disk, ""))
    };
    let (few, many) = (run(1), run(1000));
    for (name, value) in [
        ("vendor", 0x1af4),
        ("device", 0x1042),
        ("bar", 0xc000_0000),
        ("msix", 2),
        ("pages", 32),
        ("ecam", 1),
    ] {
        assert_eq!(few.field(name), value, "{name}\n{few}");
    }
    assert!(few.console.contains("bound=virtio-pci"), "{few}");
    assert!(many.field("reads") >= 1000 && many.field("writes") >= 1000, "{many}");
    for ended in [&few, &many] {
        assert_eq!(ended.stats().number("/devices/0/requests_through_vmm"), 0);
    }
    for range in ["pci-memory32", "pci-config", "pci-ecam"] {
        assert_eq!(few.stats().range(range), many.stats().range(range), "exits at {range}\n{many}");
    }
    let more = many.stats().exits().saturating_sub(few.stats().exits());
    println!("{more} more exits for 2000 requests");
    assert!(more < 200, "{more} more exits for 2000 requests\n{many}");
}

#[test]
fn two_thousand_requests_over_pci_cause_no_exit() {
    zero_exits("6.12");
}

#[test]
fn two_thousand_requests_over_pci_cause_no_exit_on_an_older_kernel() {
    zero_exits("6.1");
}

#[test]
fn a_pci_driver_that_is_unbound_and_bound_again_finds_its_disk() {
    need!(place::kvm());
    let kernel = need!(Kernel::usual());
    let disk = need!(StorageDaemon::start(4 * MIB));
    let rounds = if place::soak() { 200 } else { 20 };
    // By turns the driver is taken from its device, and the function from the bus; each time it is another
    // virtioN.
    let script = format!(
        r#"cd /sys/bus/pci; name=0000:00:01.0
for round in $(seq {rounds}); do
    if [ $((round % 2)) = 0 ]; then
        echo $name >drivers/virtio-pci/unbind && [ ! -e /sys/block/vda ] && echo $name >drivers/virtio-pci/bind || exit 1
    else
        echo 1 >devices/$name/remove && [ ! -e devices/$name ] && echo 1 >rescan || exit 2
    fi
    byte=$(dd if=/dev/vda bs=4k count=1 skip=$round iflag=direct 2>/dev/null | od -An -tu1 -N1)
    [ $byte = $((round * 8 % 251)) ] || {{ echo round $round: $byte; exit 3; }}
done
{COMPLAINTS} && exit 1; true"#
    );
    let ended = finish(kernel.script(&script).on_pci(&disk, ""));
    assert_eq!(ended.stats().number("/devices/0/requests_through_vmm"), 0);
}

#[test]
fn without_message_interrupts_two_devices_share_a_line_and_lose_nothing() {
    need!(place::kvm());
    let kernel = need!(Kernel::usual());
    let (from, to) = (need!(StorageDaemon::start(4 * MIB)), need!(StorageDaemon::start(4 * MIB)));
    let beside = [1, 2, 3].map(|_| StorageDaemon::start(MIB));
    // Devices 1 and 5 have the same line.
    let script = format!(
        r#"dd if=/dev/vda of=/dev/vde bs=64k iflag=direct oflag=direct 2>/dev/null & 
dd if=/dev/vde of=/dev/null bs=4k count=200 iflag=direct 2>/dev/null; wait
echo 3 >/proc/sys/vm/drop_caches; cmp /dev/vda /dev/vde || exit 1
echo shared=$(grep -c 'IO-APIC.*fasteoi.*virtio0, virtio4' /proc/interrupts)
{COMPLAINTS} && exit 1; true"#
    );
    let launch = kernel.launch(&format!("pci=nomsi {}", Kernel::words(&script)));
    let mut launch = launch.on_pci(&from, "");
    let mut running = Vec::new();
    for disk in beside {
        let disk = need!(disk);
        launch = launch.on_pci(&disk, "");
        running.push(disk);
    }
    let ended = finish(launch.on_pci(&to, ""));
    assert_eq!(ended.field("shared"), 1, "{ended}");
    assert!(to.contents() == from.contents(), "{ended}");
}

#[test]
fn without_message_interrupts_a_line_that_moves_from_cpu_to_cpu_loses_nothing() {
    need!(place::kvm());
    let kernel = need!(Kernel::usual());
    let disk = need!(StorageDaemon::start(4 * MIB));
    let script = format!(
        r#"n=$(grep virtio0 /proc/interrupts | cut -d: -f1 | tr -d ' ')
(while :; do for cpu in 1 2; do echo $cpu >/proc/irq/$n/smp_affinity; done; done) &
mover=$!; read_all() {{ for round in 1 2 3 4; do dd if=/dev/vda of=/dev/null bs=4k count=100 iflag=direct 2>/dev/null || exit 1; done; }}
read_all & one=$!; read_all & two=$!; wait $one && wait $two || exit 1
kill $mover; grep virtio0 /proc/interrupts
{COMPLAINTS} && exit 2; true"#
    );
    let launch = kernel.launch(&format!("pci=nomsi {}", Kernel::words(&script))).args(["--cpus", "2"]);
    finish(launch.on_pci(&disk, ""));
}

#[test]
fn sixteen_devices_on_the_bus_and_one_beside_it_are_told_apart() {
    need!(place::kvm());
    let kernel = need!(Kernel::usual());
    const DISKS: u8 = 16;
    let disks: Vec<_> = (0..=DISKS)
        .map(|n| {
            let mut image = vec![0; MIB];
            image[0] = 100 + n;
            StorageDaemon::serving(&image)
        })
        .collect();
    let mut launch = kernel.script(&format!(
        r#"sum=0; found=""
for disk in /sys/block/vd*; do
    byte=$(dd if=/dev/${{disk##*/}} bs=4k count=1 iflag=direct 2>/dev/null | od -An -tu1 -N1)
    sum=$((sum + byte)); case $(readlink $disk) in *pci0000*) found="$found x" ;; esac
done
set -- $found; echo disks=$(ls -d /sys/block/vd* | wc -l) on-pci=$# sum=$sum
{COMPLAINTS} && exit 1; true"#
    ));
    let (mut expected, mut running) = (0, Vec::new());
    for (n, disk) in disks.into_iter().enumerate() {
        let disk = need!(disk);
        expected += 100 + u64::try_from(n).unwrap();
        launch = if n == 0 { launch.disk(&disk.socket()) } else { launch.on_pci(&disk, "") };
        running.push(disk);
    }
    let ended = finish(launch);
    assert_eq!((ended.field("disks"), ended.field("on-pci")), (17, 16), "{ended}");
    assert_eq!(ended.field("sum"), expected, "{ended}");
}
