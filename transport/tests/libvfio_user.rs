//! Against libvfio-user, the C library by which SPDK and QEMU serve devices: the engine of `tests/backends/engine.c` on it,
//! and one of its own samples. Built by `tests/backends/fetch` out of QEMU's source.

#![cfg(test)]

mod support;

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use support::fetched::{fetched, until_listening};
use support::vfio_user::eventfds;
use support::{GuestMemory, Scratch, eventually};
use transport::memory::{GuestAddr, SharedRegion};
use transport::peer::{Cause, Error, Limits};
use transport::vfio_user::migration::FeatureUse;
use transport::vfio_user::{
    Client, DmaRights, Feature, IoFdKind, IrqEvent, IrqIndex, RegionIndex, Sharing, SmallWrite,
};

const REGISTERS: RegionIndex = RegionIndex(0);
const SPARSE: RegionIndex = RegionIndex(1);
const LARGE: RegionIndex = RegionIndex(2);
const SOON: Duration = Duration::from_secs(5);

struct Running {
    child: Child,
    socket: PathBuf,
    _scratch: Scratch,
}

impl Running {
    /// `None`, with a printed reason, where it was not built.
    fn start(name: &str, arguments: &[&str]) -> Option<Self> {
        let program = fetched(&format!("libvfio-user-{name}"))?;
        let scratch = Scratch::new();
        let socket = scratch.path("s");
        let mut command = Command::new(program);
        command.args(arguments).arg(&socket).stdin(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().unwrap();
        until_listening(&socket, SOON);
        Some(Self { child, socket, _scratch: scratch })
    }

    fn engine() -> Option<Self> {
        Self::start("engine", &["--socket"])
    }

    fn client(&self) -> Client {
        Client::connect(&self.socket, &Limits::new(SOON)).unwrap()
    }

    fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill().unwrap_or_default();
        self.child.wait().map(drop).unwrap_or_default();
    }
}

fn get(client: &Client, at: u64) -> u32 {
    let mut data = [0; 4];
    client.read(REGISTERS, at, &mut data).unwrap();
    u32::from_le_bytes(data)
}

fn set(client: &Client, at: u64, value: u32) {
    client.write(REGISTERS, at, &value.to_le_bytes()).unwrap();
}

fn errno(outcome: Result<(), Error>) -> u64 {
    let error = outcome.unwrap_err();
    assert!(!error.is_fatal(), "{error}");
    match error.cause() {
        Cause::Refused(errno) => *errno,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_device_is_found_with_all_that_it_offers() {
    let Some(running) = Running::engine() else { return };
    let client = running.client();
    let version = client.version();
    assert_eq!((version.server, version.agreed.max_msg_fds), ((0, 1), 8));
    assert!(!version.agreed.twin_socket && !version.agreed.write_multiple && version.must_not_cross());
    let info = client.device_info().unwrap();
    assert!(info.is_pci() && info.can_reset());
    assert_eq!((info.regions, info.irqs), (10, 5));
    let areas = |index| {
        let info = client.region_info(index).unwrap();
        (
            info.size,
            info.areas.iter().map(|area| (area.offset, area.size)).collect::<Vec<_>>(),
            info.fd.is_some(),
        )
    };
    assert_eq!(areas(REGISTERS), (0x1000, Vec::new(), false));
    assert_eq!(areas(SPARSE), (0x1_0000, vec![(0x1000, 0x2000), (0x8000, 0x8000)], true));
    assert_eq!(areas(LARGE), (0x10_0000, vec![(0, 0x10_0000)], true));
    assert_eq!(areas(RegionIndex::CONFIG), (0x1000, Vec::new(), false));
    assert_eq!(areas(RegionIndex(9)), (0, Vec::new(), false), "where old ones have their migration");
    assert!(!client.region_info(RegionIndex(10)).unwrap_err().is_fatal());
    let counts: Vec<_> = (0..5).map(|index| client.irq_info(IrqIndex(index)).unwrap().count).collect();
    assert_eq!(counts, [1, 0, 32, 1, 1]);
    assert!(!client.irq_info(IrqIndex(5)).unwrap_err().is_fatal());
    // What this version does not know is refused, and nothing more.
    let small = SmallWrite::new(REGISTERS, 8, &[1]).unwrap();
    assert!(matches!(client.write_multi(&[small]).unwrap_err().cause(), Cause::NotNegotiated));
    assert!(!client.has_feature(Feature::MIGRATION, FeatureUse::Get).unwrap());
    assert_eq!(client.migration().unwrap().map(|_| ()), None);
    assert_eq!(get(&client, 0), u32::from_le_bytes(*b"ENGN"));
}

#[test]
fn accesses_of_all_sizes_arrive_and_those_outside_are_refused() {
    let Some(running) = Running::engine() else { return };
    let client = running.client();
    set(&client, 8, 0x1234_5678);
    assert_eq!(get(&client, 8), 0x1234_5678);
    let mut wide = [0; 8];
    client.read(REGISTERS, 4, &mut wide).unwrap();
    assert_eq!(wide, [1, 0, 0, 0, 0x78, 0x56, 0x34, 0x12]);
    assert_eq!(errno(client.read(REGISTERS, 0xffe, &mut [0; 4])), 22);
    assert_eq!(errno(client.write(REGISTERS, 0xf0, &[0; 4])), 5, "a register that fails");
    assert_eq!(errno(client.read(RegionIndex(5), 0, &mut [0; 4])), 1, "the table of MSI-X");
    // It reads what follows a header by one call: as much as there is.
    let data: Vec<u8> = (0..0x10_0000_u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
    client.write(LARGE, 0, &data).unwrap();
    let mut back = vec![0; data.len()];
    client.read(LARGE, 0, &mut back).unwrap();
    assert!(back == data, "1 MiB comes back otherwise");
    let info = client.region_info(LARGE).unwrap();
    assert_eq!(rustix::io::pread(info.fd.unwrap(), &mut wide, 0x1000).unwrap(), 8);
    assert_eq!(wide, data[0x1000..0x1008], "its file is the same memory");
    for n in 0..2000 {
        client.post_write(REGISTERS, 0x50, &u32::to_le_bytes(n)).unwrap();
    }
    assert_eq!(
        (get(&client, 0x54), get(&client, 0x58)),
        (2000, 1999 * 1000),
        "posted writes come before reads"
    );
    client.post_write(REGISTERS, 0xf0, &[0; 4]).unwrap();
    assert_eq!(get(&client, 8), 0x1234_5678, "one that fails is not answered");
    assert_eq!(client.stats().late, 0);
}

#[test]
fn interrupts_are_armed_in_batches_triggered_masked_and_let_go() {
    let Some(running) = Running::engine() else { return };
    let client = running.client();
    let before = running.descriptors();
    let events = eventfds(32);
    let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
    let came = |number: usize| {
        let mut count = [0; 8];
        rustix::io::read(&events[number], &mut count).map_or(0, |_| u64::from_ne_bytes(count))
    };
    client.disable_irqs(IrqIndex::INTX).unwrap();
    client.arm_irqs(IrqIndex::MSIX, &fds).unwrap();
    assert_eq!(running.descriptors(), before + 32);
    client.write(RegionIndex::CONFIG, 0x42, &[0, 0x80]).unwrap();
    for number in [0, 7, 8, 31] {
        set(&client, 0x38, u32::try_from(number).unwrap());
        assert_eq!(came(number), 1, "{number}");
    }
    client.trigger_irqs(IrqIndex::MSIX, 30, 2).unwrap();
    assert_eq!((came(29), came(30), came(31)), (0, 1, 1));
    client.disable_irqs(IrqIndex::MSIX).unwrap();
    assert_eq!(running.descriptors(), before, "all are closed");
    client.write(RegionIndex::CONFIG, 0x42, &[0, 0]).unwrap();
    assert!(errno(client.arm_irqs(IrqIndex::MSI, &fds[..1])) == 22, "it has none");
    // The pin shares their list; while it is masked the device waits.
    client.arm_irqs(IrqIndex::INTX, &fds[..1]).unwrap();
    client.mask_irqs(IrqIndex::INTX, 0, 1).unwrap();
    set(&client, 0x38, 0);
    assert_eq!(came(0), 0);
    client.unmask_irqs(IrqIndex::INTX, 0, 1).unwrap();
    assert_eq!(came(0), 1);
    // An eventfd by which the guest would unmask is taken, and nothing is done with it.
    client.set_eventfds(IrqIndex::INTX, 0, &fds[1..2], IrqEvent::Unmask).unwrap();
    set(&client, 0x38, 0);
    assert_eq!(came(0), 1);
    client.disable_irqs(IrqIndex::INTX).unwrap();
    set(&client, 0x38, 0);
    assert_eq!((get(&client, 0x64), came(0)), (6, 0));
}

#[test]
fn doorbells_come_with_their_eventfds_and_are_counted() {
    let Some(running) = Running::engine() else { return };
    let client = running.client();
    let bells = client.region_io_fds(&client.region_info(REGISTERS).unwrap()).unwrap();
    assert_eq!(bells.len(), 16);
    assert!(bells.iter().all(|bell| bell.place.kind == IoFdKind::Ioeventfd && bell.place.size == 4));
    let own = bells.iter().find(|bell| bell.place.offset == 0x80c).unwrap();
    let shared = bells.iter().find(|bell| bell.place.value() == Some(5)).unwrap();
    assert_eq!((own.place.value(), shared.place.offset), (None, 0x840));
    for bell in [own, own, shared] {
        rustix::io::write(&bell.fd, &1_u64.to_ne_bytes()).unwrap();
    }
    assert_eq!((get(&client, 0x8c), get(&client, 0x80 + 4 * 13), get(&client, 0x6c)), (2, 1, 3));
    assert!(client.region_io_fds(&client.region_info(SPARSE).unwrap()).unwrap().is_empty());
    let absent = client.region_info(RegionIndex(3)).unwrap();
    assert!(!client.region_io_fds(&absent).unwrap_err().is_fatal());
}

/// Has the engine copy `size` bytes and waits; its status.
fn copy(client: &Client, from: u64, to: u64, size: u64) -> u32 {
    for (at, value) in [(0x18, from), (0x20, to), (0x28, size)] {
        client.write(REGISTERS, at, &value.to_le_bytes()).unwrap();
    }
    set(client, 0x10, 1);
    get(client, 0x0c)
}

#[test]
fn memory_is_shared_or_asked_for_and_taken_back() {
    let Some(running) = Running::engine() else { return };
    let client = running.client();
    let memory = GuestMemory::new(4 << 20);
    let fd = memory.map.regions()[0].shared_fd();
    let part = |at: u64, offset| SharedRegion::new(GuestAddr(at), 2 << 20, Arc::clone(fd), offset);
    let data: Vec<u8> = (0..200_000_u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[2]).collect();
    for (far, sharing) in [(4_u64 << 30, Sharing::Descriptor), (8 << 30, Sharing::Messages)] {
        let before = running.descriptors();
        client.dma_map(&part(0, 0), DmaRights::ReadWrite, Sharing::Descriptor).unwrap();
        client.dma_map(&part(far, 2 << 20), DmaRights::ReadWrite, sharing).unwrap();
        assert_eq!(get(&client, 0x5c), 2);
        memory.write(0x1003, &data);
        // Out of one and into the other, and back.
        assert_eq!(copy(&client, 0x1003, far + 0x2001, data.len() as u64), 2, "{sharing:?}");
        assert!(memory.read((2 << 20) + 0x2001, data.len()) == data, "{sharing:?}: what it wrote differs");
        memory.write(0x8_0000, &vec![0; data.len()]);
        assert_eq!(copy(&client, far + 0x2001, 0x8_0000, data.len() as u64), 2, "{sharing:?}");
        assert!(memory.read(0x8_0000, data.len()) == data, "{sharing:?}: what it read differs");
        // Past the end of all, and into what may only be read.
        assert_eq!(copy(&client, 0, far + (2 << 20) - 8, 16), 3, "{sharing:?}");
        let overlapping = client.dma_map(&part(far + 0x1000, 0), DmaRights::Read, Sharing::Descriptor);
        assert!(!overlapping.unwrap_err().is_fatal());
        client.dma_unmap(GuestAddr(far), 2 << 20).unwrap();
        assert_eq!((get(&client, 0x5c), copy(&client, 0, far, 16)), (1, 3), "{sharing:?}");
        assert!(!client.dma_unmap(GuestAddr(far), 2 << 20).unwrap_err().is_fatal());
        client.dma_map(&part(far, 0), DmaRights::Read, sharing).unwrap();
        assert_eq!((copy(&client, 0, far, 16), copy(&client, far, 0, 16)), (3, 2), "{sharing:?}: read only");
        client.dma_unmap_all().unwrap();
        assert_eq!((get(&client, 0x5c), running.descriptors()), (0, before), "{sharing:?}");
    }
    let stats = client.stats();
    assert!(stats.dma_reads > 0 && stats.dma_writes > 0, "{stats:?}");
}

#[test]
fn a_reset_and_the_next_client_find_the_device_as_new() {
    let Some(running) = Running::engine() else { return };
    let client = running.client();
    let before = running.descriptors();
    let memory = GuestMemory::new(2 << 20);
    let events = eventfds(1);
    client.dma_map_all(&memory.map, Sharing::Descriptor).unwrap();
    client.arm_irqs(IrqIndex::INTX, &[events[0].as_fd()]).unwrap();
    set(&client, 8, 77);
    client.write(RegionIndex::CONFIG, 4, &[7, 0]).unwrap();
    client.reset().unwrap();
    assert_eq!((get(&client, 8), get(&client, 0x5c)), (0, 1), "maps stay");
    set(&client, 0x38, 0);
    assert_eq!(rustix::io::read(&events[0], &mut [0; 8]).unwrap(), 8, "interrupts stay");
    // A function level reset is two bytes of the PCI Express capability.
    set(&client, 8, 78);
    client.write(RegionIndex::CONFIG, 0x64, &[0, 0x80]).unwrap();
    assert_eq!(get(&client, 8), 0);
    client.shut_down();
    eventually("the server lets go", SOON, || running.descriptors() == before - 1);
    let next = running.client();
    assert_eq!((get(&next, 0x5c), running.descriptors()), (0, before));
    // A second one is taken by the kernel, and never answered.
    let short = Limits::new(Duration::from_millis(300));
    let error = Client::connect(&running.socket, &short).map(drop).unwrap_err();
    assert!(error.is_silence(), "{error}");
    assert_eq!(get(&next, 0), u32::from_le_bytes(*b"ENGN"));
}

#[test]
fn a_device_that_must_be_quiet_first_takes_its_time() {
    let Some(running) = Running::start("engine", &["--quiesce", "60", "--socket"]) else { return };
    for _ in 0..3 {
        let client = running.client();
        let memory = GuestMemory::new(2 << 20);
        let slow = |what: &dyn Fn() -> Result<(), Error>| {
            let begun = std::time::Instant::now();
            what().unwrap();
            begun.elapsed() >= Duration::from_millis(50)
        };
        assert!(slow(&|| client.dma_map_all(&memory.map, Sharing::Descriptor)));
        assert!(!slow(&|| client.read(REGISTERS, 0, &mut [0; 4])));
        set(&client, 8, 5);
        assert!(slow(&|| client.write(RegionIndex::CONFIG, 0x64, &[0, 0x80])), "a function level reset");
        assert!(slow(&|| client.reset()));
        assert_eq!((get(&client, 8), get(&client, 0x5c)), (0, 1));
        memory.write(0, b"quiet");
        assert_eq!((copy(&client, 0, 0x1000, 5), memory.read(0x1000, 5)), (2, b"quiet".to_vec()));
        // What it was asked before it was quiet is answered in order.
        let pending = client.begin_read(REGISTERS, 0, 4).unwrap();
        assert!(slow(&|| client.dma_unmap_all()));
        pending.wait(&mut [0; 4]).unwrap();
        assert_eq!(get(&client, 0x5c), 0);
    }
}

#[test]
fn the_migration_region_of_a_sample_is_seen_and_left_alone() {
    let Some(running) = Running::start("server", &[]) else { return };
    let client = running.client();
    let region = client.region_info(RegionIndex(9)).unwrap();
    // Two capabilities in a chain: the type, and one area behind the registers.
    assert_eq!((region.size, region.areas.len(), region.flags & 8), (0x5000, 1, 8));
    assert_eq!((region.areas[0].offset, region.areas[0].file_offset), (0x1000, 0x4000));
    let bar = client.region_info(SPARSE).unwrap();
    assert_eq!(bar.areas.iter().map(|area| area.offset).collect::<Vec<_>>(), [0, 0x2000]);
    assert_eq!(client.migration().unwrap().map(|_| ()), None, "migration of the first kind is not spoken");
    let later = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() + 1000;
    client.write(REGISTERS, 0, &later.to_le_bytes()).unwrap();
    client.reset().unwrap();
}
