//! PCI devices in vfio-user servers, on the crate `vfio_user`: an NVMe controller under a stock driver, and a
//! DMA engine under a program of ours; the engine on libvfio-user, and that library's samples, too. Needs a
//! KVM that runs stock kernels: this host's, or the lab's.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs::File;
use std::io::Read;
use std::time::Duration;

use outboard_tests::guest::{COMPLAINTS, Done, Guest};
use outboard_tests::launch::{Ended, Launch};
use outboard_tests::place::Missing;
use outboard_tests::vfio::{self, Library, Server};
use outboard_tests::{need, place};

const MIB: usize = 1 << 20;
/// From the start to the end of a machine with a script, on a quiet host.
const SCRIPT: Duration = Duration::from_secs(60);
/// The driver's own patience, in place of 30 s.
const IMPATIENT: &str = "nvme_core.io_timeout=3 nvme_core.admin_timeout=3";

fn ready() -> Result<(), Missing> {
    place::kvm()?;
    vfio::guest("", "", None).map(|_| ())
}

fn guest(drivers: &str, words: &str, script: Option<&str>) -> Launch {
    vfio::guest(drivers, words, script).unwrap()
}

fn random(size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
    bytes
}

/// With a deadline for a busy lab, unless `more` has one.
fn with(launch: Launch, server: &Server, more: &str) -> Launch {
    let patience = if more.contains("deadline=") { "" } else { ",deadline=20000" };
    launch.arg("--vfio-user").arg(server.device(more) + patience)
}

fn finish(launch: Launch) -> Ended {
    let ended = launch.start().end(SCRIPT).with_code(0);
    assert!(ended.console.replace('\r', "").contains("@exit 0\n"), "the script failed\n{ended}");
    assert!(!ended.log.contains("warn: ") && !ended.log.contains("error: "), "the VMM complains\n{ended}");
    println!("{:?}, {} exits", ended.took, ended.stats().exits());
    ended
}

#[test]
fn a_stock_driver_finds_an_nvme_controller_as_it_is() {
    need!(ready());
    let server = Server::nvme(&random(8 * MIB), &[]);
    let script = format!(
        r#"f=$(function_of 0x0b0e); d=/sys/bus/pci/devices/$f
[ $(cat $d/vendor) = 0x1234 ] && [ $(cat $d/class) = 0x010802 ] || exit 1
[ $(cat $d/subsystem_vendor) = 0x1af4 ] && [ $(cat $d/subsystem_device) = 0x0b0e ] || exit 2
[ "$(readlink $d/driver)" = ../../../bus/pci/drivers/nvme ] || exit 3
set -- $(head -n 1 $d/resource)
echo bar_size=$(($2 - $1 + 1)) bar_flags=$(($3 & 0x20000f)) vectors=$(ls $d/msi_irqs | wc -l)
wait_for [ -b /dev/nvme0n1 ]
echo sectors=$(cat /sys/block/nvme0n1/size) flr=$(grep -c flr $d/reset_method)
[ "$(cat /sys/block/nvme0n1/device/model | tr -d ' ')" = outboardtestNVMe ] || exit 4
count() {{ grep "$1\$" /proc/interrupts | awk '{{ n += $2 + $3 }} END {{ print n }}'; }}
before=$(($(count nvme0q1) + $(count nvme0q2)))
for cpu in 0 1; do taskset $((1 << cpu)) dd if=/dev/nvme0n1 of=/dev/null bs=4k count=100 iflag=direct 2>/dev/null || exit 5; done
echo interrupts=$(($(count nvme0q1) + $(count nvme0q2) - before)) admin=$(count nvme0q0)
{COMPLAINTS} && exit 6; true"#
    );
    let launch = guest("", "", Some(&script)).args(["--cpus", "2"]);
    let ended = finish(with(launch, &server, ""));
    assert_eq!(ended.field("bar_size"), 0x4000, "{ended}");
    assert_eq!(ended.field("bar_flags"), 0xc, "memory, 64 bits, prefetchable\n{ended}");
    assert_eq!(ended.field("vectors"), 3, "two queues and the administrator's\n{ended}");
    assert_eq!((ended.field("sectors"), ended.field("flr")), (16384, 1), "{ended}");
    assert!(ended.field("admin") > 0, "{ended}");
    assert!((200..=300).contains(&ended.field("interrupts")), "{ended}");
}

/// The first half of each disk is copied to the second, past the guest's page cache, and summed.
#[test]
fn megabytes_go_both_ways_with_mapped_trapped_and_posted_doorbells() {
    need!(ready());
    // MiB, doorbells, wire, and what the command line says.
    let ways = [
        (64, "mapped", "plain", ""),
        (16, "trapped", "plain", ""),
        (16, "trapped", "extended", ",posted-writes=on"),
    ];
    let disks = ways.map(|(mib, doorbells, wire, _)| {
        let bytes = random(mib * MIB);
        let both = [&bytes[..], &vec![0; mib * MIB]].concat();
        (Server::nvme(&both, &["--doorbells", doorbells, "--wire", wire]), bytes)
    });
    let mut script = String::new();
    for (n, (mib, ..)) in (1..).zip(ways) {
        script += &format!(
            r#"disk() {{ [ -e /sys/bus/pci/devices/0000:00:0{n}.0/nvme/nvme*/nvme*n1 ]; }}; wait_for disk
d=$(echo /sys/bus/pci/devices/0000:00:0{n}.0/nvme/nvme*/nvme*n1); d=/dev/${{d##*/}}; wait_for [ -b $d ]
dd if=$d of=$d bs=1M count={mib} seek={mib} iflag=direct oflag=direct 2>/dev/null || exit {n}1
a=$(dd if=$d bs=256k count=$(({mib} * 4)) iflag=direct 2>/dev/null | md5sum)
b=$(dd if=$d bs=1M count={mib} skip={mib} 2>/dev/null | md5sum)
[ "$a" = "$b" ] || exit {n}2
"#
        );
    }
    script += &format!("sync; {COMPLAINTS} && exit 3; true");
    let launch = disks
        .iter()
        .zip(ways)
        .fold(guest("", "", Some(&script)), |launch, ((server, _), way)| with(launch, server, way.3));
    let ended = finish(launch);
    for ((server, bytes), way) in disks.iter().zip(ways) {
        let disk = server.disk();
        assert!(disk[..bytes.len()] == *bytes, "{way:?}: the guest's reads have written\n{ended}");
        assert!(
            disk[bytes.len()..] == *bytes,
            "{way:?}: the disk differs from what the guest wrote\n{ended}"
        );
    }
}

#[test]
fn two_thousand_requests_with_mapped_doorbells_cause_no_exit() {
    need!(ready());
    let server = Server::nvme(&random(16 * MIB), &[]);
    // Both runs print the same number of characters.
    let run = |requests: u32| {
        let script = format!(
            "wait_for [ -b /dev/nvme0n1 ]\n\
             dd if=/dev/nvme0n1 of=/dev/null bs=4k count={requests:04} iflag=direct 2>/dev/null && \
             dd if=/dev/zero of=/dev/nvme0n1 bs=4k count={requests:04} oflag=direct 2>/dev/null"
        );
        finish(with(guest("", "", Some(&script)), &server, ""))
    };
    let (few, many) = (run(1), run(2000));
    let more = many.stats().exits().saturating_sub(few.stats().exits());
    println!("{more} more exits for 4000 requests");
    assert!(more < 200, "{more} more exits for 4000 requests\n{many}");
}

#[test]
fn a_driver_is_unbound_and_bound_and_the_function_reset() {
    need!(ready());
    let server = Server::nvme(&vec![0x5a; 8 * MIB], &[]);
    let rounds = if place::soak() { 100 } else { 4 };
    let script = format!(
        r#"f=$(function_of 0x0b0e); cd /sys/bus/pci/drivers/nvme
wait_for [ -b /dev/nvme0n1 ]
want=$(dd if=/dev/nvme0n1 bs=64k count=4 iflag=direct 2>/dev/null | md5sum)
for round in $(seq {rounds}); do
    echo $f >unbind && [ ! -e /dev/nvme0 ] && echo $f >bind || exit 1
    wait_for [ -b /dev/nvme0n1 ]
    [ "$(dd if=/dev/nvme0n1 bs=64k count=4 iflag=direct 2>/dev/null | md5sum)" = "$want" ] || exit 2
    echo 1 >/sys/bus/pci/devices/$f/reset || exit 3
    [ "$(dd if=/dev/nvme0n1 bs=64k count=4 iflag=direct 2>/dev/null | md5sum)" = "$want" ] || exit 4
done
echo 1 >/sys/bus/pci/devices/$f/remove; [ ! -e /sys/bus/pci/devices/$f ] || exit 5
echo 1 >/sys/bus/pci/rescan; wait_for [ -b /dev/nvme0n1 ]
[ "$(dd if=/dev/nvme0n1 bs=64k count=4 iflag=direct 2>/dev/null | md5sum)" = "$want" ] || exit 6
{COMPLAINTS} && exit 7; true"#
    );
    finish(with(guest("", "", Some(&script)), &server, ""));
}

/// A guest that waits for commands, with a disk under load, and what it takes the server for afterwards.
#[test]
fn a_server_killed_under_load_leaves_a_machine_that_lives_and_reads_all_ones() {
    need!(ready());
    let mut server = Server::nvme(&vec![0; 64 * MIB], &[]);
    let mut engine = Server::engine(&[]);
    let launch = guest("", IMPATIENT, None).args(["--cpus", "2"]);
    let launch = with(with(launch, &server, ""), &engine, "");
    let mut guest = Guest::boot(launch);
    guest.run(". /functions; wait_for [ -b /dev/nvme0n1 ]; echo 1 >/sys/bus/pci/devices/$(function_of 0x0b0f)/enable");
    guest.run(
        "(while dd if=/dev/nvme0n1 of=/dev/null bs=64k iflag=direct 2>/dev/null; do :; done) >/dev/null 2>&1 </dev/null &",
    );
    guest.run("sleep 1");
    server.kill();
    // The other device goes on, and so does the machine.
    let other = guest.run(". /functions; engine $(function_of 0x0b0f) dma");
    assert!(other.contains("dma=ok"), "{other}");
    let gone = guest.exec(
        ". /functions; f=$(function_of 0x0b0e); \
         [ -z \"$f\" ] || od -An -tx4 -N4 /sys/bus/pci/devices/$f/config; \
         for n in $(seq 400); do \
             [ \"$(dd if=/dev/nvme0n1 bs=4k count=1 iflag=direct 2>/dev/null | wc -c)\" = 4096 ] || exit 0; usleep 50000; \
         done; exit 9",
        SCRIPT,
    );
    assert_eq!(gone.status, 0, "the disk still answers: {}", gone.text);
    assert!(gone.text.trim().is_empty() || gone.text.contains("ffffffff"), "{}", gone.text);
    engine.kill();
    let read = guest.exec(". /functions; f=$(function_of 0x0b0f); [ -z \"$f\" ] || engine $f read 8", SCRIPT);
    assert!(read.text.trim().is_empty() || read.text.contains("0xffffffff"), "{}", read.text);
    guest.last_words("poweroff -f");
    let ended = guest.into_vm().end(SCRIPT).with_code(0);
    assert_eq!(ended.stats().text("/end"), "power-off");
    for device in [0, 1] {
        assert_eq!(ended.stats().text(&format!("/devices/{device}/state")), "broken", "{ended}");
    }
}

/// The driver of a disk under load lets go of it when its server is killed, and nothing is left of the
/// function; the guest itself switches another device off, which is there again after a reboot.
fn loses_a_disk(series: &str) {
    let mut server = Server::nvme(&vec![0; 16 * MIB], &[]);
    let engine = Server::engine(&[]);
    let launch = vfio::guest_of(series, "", "", None).unwrap().args(["--cpus", "2", "-v"]);
    let mut guest = Guest::boot(with(with(launch, &server, ",id=disk"), &engine, ""));
    guest.run(
        ". /functions; wait_for [ -b /dev/nvme0n1 ]; [ $(ls /sys/bus/pci/slots | wc -l) = 2 ] && \
         [ $(cat /sys/bus/pci/slots/1/address) = 0000:00:01 ] && [ $(function_of 0x0b0e) = 0000:00:01.0 ]",
    );
    let events = "grep ACPI:Ged /proc/interrupts | awk '{ print $2 + $3 }'";
    assert_eq!(guest.run(events), "0");
    guest.run(
        "(while dd if=/dev/nvme0n1 of=/dev/null bs=64k iflag=direct 2>/dev/null; do :; done; echo >/tmp/end) >/dev/null 2>&1 </dev/null &",
    );
    guest.run("sleep 1");
    server.kill();
    // Long before the driver's own patience, which is 30 s.
    let gone = guest.exec(
        ". /functions; wait_for [ ! -e /sys/bus/pci/devices/0000:00:01.0 ]; wait_for [ ! -e /dev/nvme0 ]; \
         wait_for [ -e /tmp/end ]; [ ! -e /sys/block/nvme0n1 ] && [ $(cat /sys/bus/pci/slots/1/power) = 0 ]",
        SCRIPT,
    );
    assert_eq!(gone.status, 0, "{}", gone.text);
    let count: u32 = guest.run(events).parse().unwrap();
    assert!((1..10).contains(&count), "{count} events");
    let other = guest
        .run(". /functions; f=$(function_of 0x0b0f); echo 1 >/sys/bus/pci/devices/$f/enable; engine $f dma");
    assert!(other.contains("dma=ok"), "{other}");
    let rescan = "echo 1 >/sys/bus/pci/rescan; ls /sys/bus/pci/devices";
    assert_eq!(guest.run(rescan), "0000:00:00.0  0000:00:02.0");
    assert_eq!(guest.run(&format!("echo 0 >/sys/bus/pci/slots/2/power; {rescan}")), "0000:00:00.0");
    // Errors of the disk are as they should be.
    let wrong = guest
        .exec("dmesg | grep -A9 -e 'Call Trace' -e BUG: -e WARNING: -e 'nobody cared' -e lockup", SCRIPT);
    assert_eq!(wrong.text.trim(), "");
    guest.last_words("reboot -f");
    guest.wait_ready();
    let other = guest.run(&format!(
        ". /functions; {rescan}; f=$(function_of 0x0b0f); echo 1 >/sys/bus/pci/devices/$f/enable; engine $f dma"
    ));
    assert!(other.contains("0000:00:00.0  0000:00:02.0") && other.contains("dma=ok"), "{other}");
    guest.last_words("poweroff -f");
    let ended = guest.into_vm().end(SCRIPT).with_code(0);
    assert_eq!(ended.stats().text("/end"), "power-off");
    assert_eq!(ended.stats().text("/devices/0/state"), "broken", "{ended}");
    assert_eq!(ended.stats().text("/devices/1/state"), "idle", "{ended}");
    for said in
        ["x-DEVICE_BROKEN device disk", "let go of PCI device 00:01.0", "let go of PCI device 00:02.0"]
    {
        assert!(ended.log.contains(said), "{said}\n{ended}");
    }
    assert!(!ended.log.contains("warn: "), "the VMM complains\n{ended}");
}

#[test]
fn a_guest_lets_go_of_a_disk_whose_server_is_killed() {
    need!(ready());
    loses_a_disk("6.12");
}

#[test]
fn an_older_guest_lets_go_of_a_disk_whose_server_is_killed() {
    need!(ready());
    loses_a_disk("6.1");
}

/// The engine's programs, one after another.
fn drives(server: &Server, more: &str, programs: &[&str]) -> Ended {
    let mut script = String::from("f=$(function_of 0x0b0f); d=/sys/bus/pci/devices/$f; echo 1 >$d/enable\n");
    for program in programs {
        script += &format!("engine $f {program} || {{ dmesg | tail -n 5; exit 1; }}\n");
    }
    script += &format!("{COMPLAINTS} && exit 7; true");
    finish(with(guest("", "", Some(&script)), server, more))
}

/// Engines of each wire, with and without posted writes and a socket of their own for requests, in one guest:
/// each reaches memory by mapping and by messages in the middle of a request, its memory is reached, every
/// vector comes, is masked, pends and moves, and a function-level reset brings back what was.
#[test]
fn engines_of_every_kind_reach_memory_interrupt_and_are_reset() {
    need!(ready());
    let kinds = [
        (&["--wire", "plain"][..], ""),
        (&["--wire", "extended"], ""),
        (&["--wire", "extended"], ",posted-writes=on"),
        (&["--wire", "extended", "--twin-socket"], ""),
    ];
    let servers = kinds.map(|(options, more)| (Server::engine(options), more));
    let script = format!(
        r#"for n in 1 2 3 4; do
    f=0000:00:0$n.0 d=/sys/bus/pci/devices/0000:00:0$n.0; echo 1 >$d/enable
    for program in dma areas "posted 500" "reads 100" "doorbells 20" "store 1000" "irq msix 300" "irq msi 300" "irq msix 10"; do
        engine $f $program || {{ dmesg | tail -n 5; exit 1$n; }}
    done
    [ $n = 1 ] || MESSAGES=1 engine $f dma || exit 2$n
done
f=0000:00:01.0; d=/sys/bus/pci/devices/$f
engine $f write 8 0x1234; [ $(engine $f read 8) = 0x1234 ] || exit 1
resets=$(engine $f read 0x48)
for n in $(seq 5); do
    before=$(cat $d/resource)
    echo 1 >$d/reset || exit 2
    [ "$before" = "$(cat $d/resource)" ] || exit 3
    [ $(engine $f read 8) = 0 ] && [ $(($(engine $f read 0x48) - resets)) = $n ] || exit 4
    engine $f dma && engine $f areas && engine $f irq msix 10 || exit 5
done
{COMPLAINTS} && exit 7; true"#
    );
    let launch = guest("", "", Some(&script));
    let launch = servers.iter().fold(launch, |launch, (server, more)| with(launch, server, more));
    let ended = finish(launch);
    assert!(ended.field("interrupts") > 0, "{ended}");
}

/// The engine on libvfio-user; says so when it is not here.
fn libvfio_user() -> Option<Server> {
    Library::all().contains(&Library::LibvfioUser).then(|| Library::LibvfioUser.engine(&[]))
}

#[test]
fn mapped_areas_and_doorbells_of_libvfio_user_cause_no_exit() {
    need!(ready());
    let Some(server) = libvfio_user() else { return };
    let run = |stores: u32, doorbells: u32| {
        let programs = [format!("store {stores:06}"), format!("doorbells {doorbells:04}")];
        drives(&server, "", &programs.each_ref().map(String::as_str))
    };
    let (few, many) = (run(1, 1), run(100_000, 500));
    let more = many.stats().exits().saturating_sub(few.stats().exits());
    println!("{more} more exits for 400 000 accesses and 8 000 doorbells");
    assert!(more < 2500, "{more} more exits\n{many}");
}

#[test]
fn an_engine_on_libvfio_user_is_shown_with_all_its_capabilities_works_and_is_reset() {
    need!(ready());
    let Some(server) = libvfio_user() else { return };
    let script = format!(
        r#"f=$(function_of 0x0b0f); d=/sys/bus/pci/devices/$f; echo 1 >$d/enable
[ $(cat $d/vendor) = 0x1234 ] && [ $(cat $d/class) = 0xff0000 ] && [ $(cat $d/revision) = 0x01 ] || exit 1
while read begin end flags; do [ $begin = 0x0000000000000000 ] || echo bar=$((end - begin + 1)),$((flags & 0x20000f)); done <$d/resource
at() {{ od -An -tx$2 -j$1 -N$2 $d/config | tr -d ' '; }}
next=0x$(at 0x34 1); caps=
while [ $next != 0x00 ]; do caps="$caps $(at $next 1)"; next=0x$(at $((next + 1)) 1); done
echo "caps$caps extended $(at 0x100 4) $(at 0x104 4) $(at 0x108 4)"
for program in dma areas "posted 500" "reads 100" "doorbells 20" "store 1000" "irq msix 300" dma; do
    engine $f $program || {{ dmesg | tail -n 5; exit 10; }}
done
for n in $(seq 3); do
    engine $f write 8 0x1234; [ $(engine $f read 8) = 0x1234 ] || exit 2
    resets=$(engine $f read 0x48) before=$(cat $d/resource)
    echo 1 >$d/reset || exit 3
    [ "$before" = "$(cat $d/resource)" ] || exit 4
    [ $(engine $f read 8) = 0 ] && [ $(($(engine $f read 0x48) - resets)) = 1 ] || exit 5
    engine $f dma && engine $f areas && engine $f irq msix 10 || exit 6
done
# Later, while the guest looks at a register, it would take that for the answer.
MESSAGES=1 AT_ONCE=1 engine $f dma || exit 7
echo 1 >$d/remove; echo 1 >/sys/bus/pci/rescan; f=$(function_of 0x0b0f); d=/sys/bus/pci/devices/$f
echo uio_pci_generic >$d/driver_override; echo $f >/sys/bus/pci/drivers_probe; wait_for [ -e /dev/uio0 ]
engine $f irq intx 100 || exit 8
{COMPLAINTS} && exit 9; true"#
    );
    let ended = finish(with(guest("uio_pci_generic", "", Some(&script)), &server, ""));
    let console = ended.console.replace('\r', "");
    // MSI-X, the vendor's, PCI Express, power management; a serial number.
    assert!(console.contains("caps 11 09 10 01 extended 00010003 0b0f1234 11223344"), "{ended}");
    assert!(ended.field("interrupts") > 0, "{ended}");
    let bars: Vec<_> = console.lines().filter_map(|line| line.strip_prefix("bar=")).collect();
    assert_eq!(bars, ["4096,0", "65536,0", "1048576,12", "32,1", "8192,0"], "{ended}");
}

/// The samples of libvfio-user, as they are.
#[test]
fn samples_of_libvfio_user_are_enumerated_and_answer() {
    need!(ready());
    let (Some(gpio), Some(server)) = (vfio::sample("gpio"), vfio::sample("server")) else { return };
    let script = format!(
        r#"f=$(function_of 0x0dc8); d=/sys/bus/pci/devices/$f; echo 1 >$d/enable
[ $(cat $d/vendor) = 0x494f ] || exit 1
pins=; for n in 1 2 3 4 5 6 7; do pins="$pins$(dd if=$d/resource2 bs=1 count=1 2>/dev/null | od -An -tu1)"; done
echo pins=$pins
f=$(function_of 0xbeef); d=/sys/bus/pci/devices/$f; echo 1 >$d/enable
[ $(cat $d/subsystem_device) = 0xbabe ] || exit 2
printf abcd | dd of=$d/resource1 bs=4 count=1 seek=1 conv=notrunc 2>/dev/null || exit 3
printf wxyz | dd of=$d/resource1 bs=4 count=1 conv=notrunc 2>/dev/null || exit 4
echo memory=$(dd if=$d/resource1 bs=4 count=1 2>/dev/null)
{COMPLAINTS} && exit 9; true"#
    );
    let ended = finish(with(with(guest("", "", Some(&script)), &gpio, ""), &server, ""));
    let console = ended.console.replace('\r', "");
    assert!(console.contains("pins= 0 0 0 1 1 1 2") || console.contains("pins=0 0 0 1 1 1 2"), "{ended}");
    assert!(console.contains("memory=wxyz"), "{ended}");
}

#[test]
fn mapped_areas_and_doorbells_with_descriptors_cause_no_exit() {
    need!(ready());
    let run = |stores: u32, doorbells: u32| {
        let server = Server::engine(&["--wire", "extended"]);
        let programs = [format!("store {stores:06}"), format!("doorbells {doorbells:04}")];
        drives(&server, "", &programs.each_ref().map(String::as_str))
    };
    let (few, many) = (run(1, 1), run(100_000, 500));
    let more = many.stats().exits().saturating_sub(few.stats().exits());
    println!("{more} more exits for 400 000 accesses and 8 000 doorbells");
    // The program looks at a register until the doorbells have been counted.
    assert!(more < 2500, "{more} more exits\n{many}");
}

#[test]
fn the_pin_is_level_triggered_and_can_be_disabled() {
    need!(ready());
    let server = Server::engine(&[]);
    let script = format!(
        r#"f=$(function_of 0x0b0f); d=/sys/bus/pci/devices/$f
echo uio_pci_generic >$d/driver_override; echo $f >/sys/bus/pci/drivers_probe; wait_for [ -e /dev/uio0 ]
engine $f irq intx 100 || exit 1
{COMPLAINTS} && exit 7; true"#
    );
    finish(with(guest("uio_pci_generic", "", Some(&script)), &server, ""));
}

fn engine_says(guest: &mut Guest, what: &str) -> Done {
    guest.exec(&format!("engine 0000:00:01.0 {what}"), SCRIPT)
}

#[test]
fn an_error_for_a_read_is_all_ones_and_nothing_more_and_a_stall_beyond_the_deadline_breaks_the_device() {
    need!(ready());
    let (plain, server) = (Server::engine(&["--wire", "plain"]), Server::engine(&["--wire", "extended"]));
    let launch = with(with(guest("", "", None), &server, ",deadline=1000"), &plain, "");
    let mut guest = Guest::boot(launch);
    for function in [1, 2] {
        let says = |guest: &mut Guest, what: &str| {
            guest.exec(&format!("engine 0000:00:0{function}.0 {what}"), SCRIPT)
        };
        guest.run(&format!("echo 1 >/sys/bus/pci/devices/0000:00:0{function}.0/enable"));
        assert_eq!(says(&mut guest, "read 0xf0").text.trim(), "0xffffffff");
        assert_eq!(says(&mut guest, "write 0xf0 1").status, 0);
        assert_eq!(says(&mut guest, "read 0").text.trim(), "0x4e474e45");
    }
    // Within the deadline, then beyond it.
    assert_eq!(engine_says(&mut guest, "write 0xf8 100").status, 0);
    assert_eq!(engine_says(&mut guest, "read 0").text.trim(), "0x4e474e45");
    engine_says(&mut guest, "write 0xf8 15000");
    let read = engine_says(&mut guest, "read 0");
    assert!(!read.text.contains("0x4e474e45"), "{}", read.text);
    guest.last_words("poweroff -f");
    let ended = guest.into_vm().end(SCRIPT).with_code(0);
    assert_eq!(ended.stats().text("/devices/0/state"), "broken", "{ended}");
    assert_eq!(ended.stats().text("/devices/1/state"), "idle", "{ended}");
}

#[test]
fn two_devices_and_their_interrupts_do_not_mix() {
    need!(ready());
    let (disk, engine) = (Server::nvme(&random(16 * MIB), &[]), Server::engine(&[]));
    let script = format!(
        r#"wait_for [ -b /dev/nvme0n1 ]; f=$(function_of 0x0b0f); echo 1 >/sys/bus/pci/devices/$f/enable
want=$(dd if=/dev/nvme0n1 bs=1M iflag=direct 2>/dev/null | md5sum)
(for n in 1 2 3; do dd if=/dev/nvme0n1 bs=64k iflag=direct 2>/dev/null | md5sum; done >/tmp/sums) &
for n in 1 2 3; do engine $f dma && engine $f irq msix 50 || exit 1; done
wait
[ $(grep -c "$want" /tmp/sums) = 3 ] || exit 2
{COMPLAINTS} && exit 3; true"#
    );
    let launch = guest("", "", Some(&script)).args(["--cpus", "2"]);
    finish(with(with(launch, &disk, ""), &engine, ""));
}
