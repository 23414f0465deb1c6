use transport::memory::GuestAddr;
use transport::vhost_user::NotifierArea;
use transport::vhost_user::message::ShmemArea;

use super::*;
use crate::bus::BusDevice;
use crate::pci::{Intx, IntxLines, Window, Windows};
use crate::ports::FileRange;
use crate::ports::{Route, WriteMatch};
use crate::testing::{Outcome, Recorder, Scripted, Shown, disk, memory};
use crate::virtio::backend::outlets::{FixedOutlet, Outlet, Outlets};
use crate::virtio::backend::requests::Answers;
use crate::virtio::types::model::Model;
use crate::virtio::types::model::SharedMemory;
use crate::virtio::{Parts, PhaseReport};

const WINDOWS: Windows = Windows {
    memory32: Window { base: 0xc000_0000, size: 0x1000_0000 },
    memory64: Window { base: 0x80_0000_0000, size: 0x40_0000_0000 },
    io: Window { base: 0xc000, size: 0x4000 },
};

/// A guest's view of one device, and both sides to which the device is connected.
struct Rig {
    device: Arc<PciDevice>,
    bridge: Arc<HostBridge>,
    ecam: Arc<dyn BusDevice>,
    machine: Recorder,
    backend: Scripted,
    outlets: Outlets,
}

fn rig(queues: u16) -> Rig {
    rig_of(disk(queues))
}

fn rig_of(model: Model) -> Rig {
    rig_with(model, Outlets::default())
}

fn rig_with(model: Model, outlets: Outlets) -> Rig {
    let (machine, backend) = (Recorder::default(), Scripted::default());
    let lines = IntxLines::new(machine.ports().interrupts).unwrap();
    let bridge = HostBridge::with_lines(WINDOWS, Intx { lines, gsis: [20, 21, 22, 23] });
    let parts = Parts {
        name: "disk0".into(),
        model,
        backend: Box::new(backend.clone()),
        memory: memory(),
        outlets: outlets.clone(),
        service: None,
    };
    let device = Arc::new(
        PciDevice::new(&DeviceHandle::new(parts).unwrap(), bridge.free().unwrap(), &bridge, &machine.ports())
            .unwrap(),
    );
    bridge.insert(bridge.free(), device.clone()).unwrap();
    lock(&backend.0).config = (1..=60).collect();
    Rig { device, ecam: bridge.ecam(), bridge, machine, backend, outlets }
}

impl Rig {
    fn config(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.ecam.read(0x8000 + offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set_config(&self, offset: u64, value: u32) {
        self.ecam.write(0x8000 + offset, &value.to_le_bytes());
    }

    fn read(&self, offset: u64, width: usize) -> u32 {
        let mut data = [0; 4];
        self.device.bar_read(BarIndex::FIRST, offset, &mut data[..width]);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, width: usize, value: u32) {
        self.device.bar_write(BarIndex::FIRST, offset, &value.to_le_bytes()[..width]);
    }

    /// Offset in the configuration space of the vendor's capability of this type.
    fn capability(&self, kind: u32) -> u64 {
        let mut at = u64::from(self.config(0x34) & 0xff);
        while self.config(at) & 0xff != 9 || self.config(at) >> 24 != kind {
            at = u64::from(self.config(at) >> 8 & 0xff);
            assert_ne!(at, 0, "no capability of type {kind}");
        }
        at
    }

    fn enable(&self) {
        self.set_config(4, 6);
    }

    fn msix_on(&self, vectors: u64) {
        for vector in 0..vectors {
            for (offset, value) in
                [(0, 0xfee0_0000), (4, 0), (8, 0x40 + u32::try_from(vector).unwrap()), (12, 0)]
            {
                self.write(TABLE + vector * 16 + offset, 4, value);
            }
        }
        let msix = u64::from(self.config(0x34));
        assert_eq!(self.config(msix) & 0xff, 0x11, "MSI-X is the first capability");
        self.set_config(msix, 0x8000_0000);
    }

    /// Does the steps of a stock driver up to and including DRIVER_OK: vector 0 for the configuration, one
    /// more vector for each queue.
    fn start_driver(&self, queues: u16) {
        self.write(0x14, 1, 0);
        assert_eq!(self.read(0x14, 1), 0);
        self.write(0x14, 1, 1);
        self.write(0x14, 1, 3);
        for select in [0, 1] {
            self.write(0x00, 4, select);
            let offered = self.read(0x04, 4);
            self.write(0x08, 4, select);
            self.write(0x0c, 4, offered);
        }
        self.write(0x14, 1, 0xb);
        assert_eq!(self.read(0x14, 1), 0xb);
        self.write(0x10, 2, 0);
        for queue in 0..queues {
            let number = u32::from(queue);
            self.write(0x16, 2, number);
            assert_eq!((self.read(0x16, 2), self.read(0x1e, 2)), (number, number));
            assert_eq!(self.read(0x18, 2), 256, "the largest size");
            self.write(0x18, 2, 64);
            self.write(0x1a, 2, number + 1);
            for (offset, value) in [(0x20, 0x1000), (0x28, 0x2000), (0x30, 0x3000)] {
                self.write(offset, 4, number * 0x1_0000 + value);
                self.write(offset + 4, 4, 0);
            }
            self.write(0x1c, 2, 1);
            assert_eq!(self.read(0x1c, 2), 1);
        }
        self.write(0x14, 1, 0xf);
    }

    fn doorbells(&self) -> Vec<WriteMatch> {
        self.machine.doorbells()
    }
}

fn bell(base: u64, queue: u64) -> WriteMatch {
    WriteMatch::anything(GuestAddr(base + NOTIFY + queue * PAGE))
}

fn message(data: u32) -> Route {
    Route::Message { address: 0xfee0_0000, data }
}

#[test]
fn function_says_what_it_is_and_where_its_structures_are() {
    let rig = rig(3);
    assert_eq!(rig.config(0), 0x1042_1af4);
    assert_eq!(rig.config(8), 0x0180_0001);
    assert_eq!(rig.config(0x10), 0xc000_0004, "small enough for the first 4 GiB");
    for (kind, offset, length) in [(1, 0, 0x40), (2, 0x1_0000, 0x3000), (3, 0x1000, 1), (4, 0x2000, 0x1000)] {
        let at = rig.capability(kind);
        assert_eq!(
            (rig.config(at + 4), rig.config(at + 8), rig.config(at + 12)),
            (0, offset, length),
            "{kind}"
        );
    }
    assert_eq!(rig.config(rig.capability(2) + 16), 0x1000, "a page for each queue");
    let msix = u64::from(rig.config(0x34));
    assert_eq!((rig.config(msix) >> 16, rig.config(msix + 4), rig.config(msix + 8)), (3, 0x8000, 0x4000));
}

#[test]
fn running_queue_has_its_doorbell_and_its_vector_and_a_reset_takes_both() {
    let rig = rig(2);
    rig.enable();
    rig.msix_on(3);
    rig.start_driver(2);
    assert_eq!(rig.device.handle().phase(), PhaseReport::Running);
    assert_eq!(rig.backend.calls(), ["start 100000200 0:64@1000,2000,3000 1:64@11000,12000,13000"]);
    assert_eq!(rig.doorbells(), [bell(0xc000_0000, 0), bell(0xc000_0000, 1)]);
    let mut routes = rig.machine.routes();
    routes.sort_by_key(|route| format!("{route:?}"));
    assert_eq!(routes, [message(0x40), message(0x41), message(0x42)]);
    rig.write(0x14, 1, 0);
    assert_eq!(rig.backend.calls(), ["stop"]);
    assert!(rig.doorbells().is_empty());
    assert!(rig.machine.routes().is_empty(), "the configuration's vector is gone with the reset, too");
    rig.write(0x16, 2, 1);
    assert_eq!((rig.read(0x10, 2), rig.read(0x1a, 2), rig.read(0x1c, 2)), (0xffff, 0xffff, 0));
}

#[test]
fn doorbells_follow_the_bar_and_come_to_us_where_they_cannot() {
    let rig = rig(1);
    rig.enable();
    rig.msix_on(2);
    rig.start_driver(1);
    rig.set_config(4, 4);
    assert!(rig.doorbells().is_empty(), "memory decoding is off");
    rig.set_config(0x10, 0xc800_0000);
    rig.set_config(4, 6);
    assert_eq!(rig.doorbells(), [bell(0xc800_0000, 0)]);
    rig.set_config(0x14, 0x90);
    rig.set_config(0x10, 0);
    assert_eq!(rig.doorbells(), [bell(0x90_0000_0000, 0)]);
    assert_eq!(rig.device.handle().phase(), PhaseReport::Running);
    rig.write(NOTIFY, 2, 0);
    assert_eq!(rig.device.handle().stats().trapped.queue_notify, 1);
    rig.bridge.clear();
}

#[test]
fn a_backend_s_notifier_lies_over_its_queue_s_page_while_the_queue_runs() {
    let rig = rig(2);
    rig.enable();
    rig.msix_on(3);
    let page = |offset, size| {
        let fd = rustix::fs::memfd_create("page", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        FileRange { fd: Arc::new(fd), offset, size }
    };
    let notifiers = BarOutlet { state: Arc::clone(&rig.device.state), layout: None, queues: 2 };
    assert!(notifiers.show_notifier(0, page(0, PAGE)).is_err(), "the queue does not run");
    rig.start_driver(2);
    assert!(
        notifiers.show_notifier(2, page(0, PAGE)).is_err()
            && notifiers.show_notifier(1, page(0, 2 * PAGE)).is_err()
    );
    notifiers.show_notifier(1, page(0, PAGE)).unwrap();
    notifiers.show_notifier(1, page(PAGE, PAGE)).unwrap();
    let shown =
        |base| Shown { at: GuestAddr(base + NOTIFY + PAGE), offset: PAGE, size: PAGE, read_only: false };
    assert_eq!(rig.machine.shown(), [shown(0xc000_0000)]);
    rig.set_config(0x10, 0xc800_0000);
    assert_eq!(rig.machine.shown(), [shown(0xc800_0000)]);
    assert_eq!(rig.doorbells().len(), 2, "they stay, underneath");
    rig.machine.vanish_all();
    rig.set_config(0x10, 0xc000_0000);
    assert!(rig.machine.shown().is_empty(), "a page that is gone does not come back");
    notifiers.show_notifier(0, page(0, PAGE)).unwrap();
    rig.write(0x14, 1, 0);
    assert!(rig.machine.shown().is_empty() && rig.doorbells().is_empty());
}

#[test]
fn a_backend_s_notifier_by_message_finds_its_place_and_is_refused_without_one() {
    let rig = rig(1);
    rig.enable();
    rig.msix_on(2);
    rig.start_driver(1);
    let area = || {
        let fd = rustix::fs::memfd_create("page", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        Some(NotifierArea { fd, size: PAGE, offset: 0 })
    };
    let answers = Answers { misses: None, tenancy: rig.outlets.tenancy() };
    assert!(answers.host_notifier(0, area()).is_err(), "its queues do not run");
    answers.tenancy.begin();
    answers.host_notifier(0, area()).unwrap();
    assert_eq!(rig.machine.shown().len(), 1);
    assert!(answers.host_notifier(7, area()).is_err(), "no such queue");
    answers.host_notifier(0, None).unwrap();
    assert!(rig.machine.shown().is_empty() && rig.doorbells().len() == 1);
    // The backend's page goes with its connection. Afterwards the backend can show nothing.
    answers.host_notifier(0, area()).unwrap();
    let successor = Answers { misses: None, tenancy: rig.outlets.tenancy() };
    assert!(rig.machine.shown().is_empty() && rig.doorbells().len() == 1);
    successor.tenancy.begin();
    assert!(answers.host_notifier(0, area()).is_err() && answers.host_notifier(0, None).is_err());
    assert!(answers.vring_call(0).is_err() && successor.vring_call(0).is_ok());
    successor.host_notifier(0, area()).unwrap();
    rig.device.handle().unplug();
    assert!(rig.machine.shown().is_empty() && successor.host_notifier(0, area()).is_err(), "on no board");
    let nowhere = Outlets::default();
    nowhere.put(Arc::new(FixedOutlet::new(rig.machine.ports().memory, vec![])));
    let answers = Answers { misses: None, tenancy: nowhere.tenancy() };
    answers.tenancy.begin();
    assert!(answers.host_notifier(0, area()).is_err(), "no place, as on virtio-mmio");
}

/// A disk with shared memory regions 1 and 3.
fn with_shared_memory(small: u64, large: u64) -> Model {
    let region = |length| Some(SharedMemory { base: GuestAddr(0), length });
    Model { shared_memory: vec![None, region(small), None, region(large)], ..disk(1) }
}

#[test]
fn shared_memory_regions_are_told_with_their_bar() {
    let rig = rig_of(with_shared_memory(0x3000, 2 << 20));
    let mut at = rig.capability(8);
    let mut found = Vec::new();
    loop {
        let words: Vec<u32> = (0..24).step_by(4).map(|offset| rig.config(at + offset)).collect();
        if words[0] & 0xff == 9 && words[0] >> 24 == 8 {
            assert_eq!(words[0] >> 16 & 0xff, 24, "its length");
            assert_eq!((words[4], words[5]), (0, 0), "the upper halves");
            found.push((words[1], words[2], words[3]));
        }
        match words[0] >> 8 & 0xff {
            0 => break,
            next => at = next.into(),
        }
    }
    assert_eq!(found, [(0x102, 0, 0x3000), (0x302, 2 << 20, 2 << 20)], "id and BAR, offset, length");
    assert_eq!((rig.config(0x18), rig.config(0x1c)), (0xc, 0x80), "prefetchable, 64 bits, above 4 GiB");
    rig.set_config(0x18, u32::MAX);
    rig.set_config(0x1c, u32::MAX);
    assert_eq!((rig.config(0x18), rig.config(0x1c)), (0xffc0_000c, u32::MAX), "4 MiB");
    // Without regions there is no such BAR.
    let plain = self::rig(1);
    plain.set_config(0x18, u32::MAX);
    assert_eq!(plain.config(0x18), 0);
}

#[test]
fn halves_of_large_regions_are_told_and_too_many_or_too_large_ones_refused() {
    let rig = rig_of(with_shared_memory(5 << 30, 16 << 30));
    let (first, second) = (rig.capability(8), rig.capability(8) + 24);
    let words = |at: u64| [8, 12, 16, 20].map(|offset| rig.config(at + offset));
    assert_eq!(words(first), [0, 1 << 30, 0, 1]);
    assert_eq!(words(second), [1 << 30, 0, 1, 4]);
    let make = |model| {
        let (machine, bridge) = (Recorder::default(), HostBridge::new(WINDOWS));
        let backend = Box::new(Scripted::default());
        let parts = Parts {
            name: "disk0".into(),
            model,
            backend,
            memory: memory(),
            outlets: Outlets::default(),
            service: None,
        };
        PciDevice::new(&DeviceHandle::new(parts).unwrap(), bridge.free().unwrap(), &bridge, &machine.ports())
            .map(drop)
    };
    let region = Some(SharedMemory { base: GuestAddr(0), length: 4096 });
    make(Model { shared_memory: vec![region; 3], ..disk(1) }).unwrap();
    make(Model { shared_memory: vec![region; 4], ..disk(1) }).unwrap_err();
    let refused = make(with_shared_memory(4096, 1 << 40)).unwrap_err();
    let why = std::error::Error::source(&refused).unwrap().to_string();
    assert!(why.contains("no room for its shared memory"), "{why}");
}

#[test]
fn what_a_backend_maps_goes_where_the_bar_goes() {
    let regions = Outlets::new(vec![0, 0x3000, 0, 2 << 20]);
    let rig = rig_with(with_shared_memory(0x3000, 2 << 20), regions.clone());
    let tenancy = regions.tenancy();
    tenancy.begin();
    let area = |shmid, shm_offset, len| ShmemArea {
        shmid,
        padding: [0; 7],
        fd_offset: 0x1000,
        shm_offset,
        len,
        flags: 1,
    };
    let map = |area: &ShmemArea| {
        let fd = rustix::fs::memfd_create("window", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 0x4000).unwrap();
        tenancy.map(area, fd)
    };
    map(&area(1, 0x1000, 0x2000)).unwrap();
    assert!(rig.machine.shown().is_empty(), "the function decodes nothing");
    rig.enable();
    map(&area(3, 0, 0x1000)).unwrap();
    assert!(map(&area(3, 0, 0x1000)).is_err() && map(&area(2, 0, 0x1000)).is_err());
    let expected = |base: u64| {
        [(base + 0x1000, 0x2000), (base + (2 << 20), 0x1000)].map(|(at, size)| Shown {
            at: GuestAddr(at),
            offset: 0x1000,
            size,
            read_only: false,
        })
    };
    assert_eq!(rig.machine.shown(), expected(0x80_0000_0000));
    // The guest sizes the BAR, as at every boot, and moves it below 4 GiB.
    rig.set_config(4, 4);
    assert!(rig.machine.shown().is_empty(), "memory decoding is off");
    rig.set_config(0x1c, 0);
    rig.set_config(0x18, 0xc840_0000);
    rig.enable();
    assert_eq!(rig.machine.shown(), expected(0xc840_0000));
    rig.set_config(0x18, 0xd000_0000);
    assert!(rig.machine.shown().is_empty(), "outside the bus's addresses");
    rig.set_config(0x18, 0xc800_0000);
    // An address without a map reads all ones, and is no register.
    let (bar, mut data) = (BarIndex::new(2).unwrap(), [0; 4]);
    rig.device.bar_read(bar, 0, &mut data);
    rig.device.bar_write(bar, 0x14, &[1]);
    assert_eq!((data, rig.read(0x14, 1)), ([0xff; 4], 0));
    // The map of a shortened file is gone for good; a reset removes all maps.
    rig.machine.vanish_all();
    rig.set_config(0x18, 0xc840_0000);
    assert!(rig.machine.shown().is_empty());
    tenancy.unmap(&area(1, 0, 0x3000)).unwrap();
    map(&area(1, 0x1000, 0x1000)).unwrap();
    assert_eq!(rig.machine.shown().len(), 1);
    tenancy.end();
    assert!(rig.machine.shown().is_empty());
    tenancy.begin();
    map(&area(1, 0, 0x1000)).unwrap();
    regions.remove();
    assert!(rig.machine.shown().is_empty(), "off its board");
}

#[test]
fn vectors_move_while_the_queue_runs() {
    let rig = rig(1);
    rig.enable();
    rig.msix_on(2);
    rig.start_driver(1);
    // Linux changes the affinity in this order: mask, another message, unmask.
    rig.write(TABLE + 16 + 12, 4, 1);
    assert_eq!(rig.machine.routes(), [message(0x40)]);
    rig.write(TABLE + 16 + 8, 4, 0x77);
    rig.write(TABLE + 16 + 12, 4, 0);
    assert!(rig.machine.routes().contains(&message(0x77)));
    rig.write(0x16, 2, 0);
    rig.write(0x1a, 2, 0);
    assert_eq!((rig.read(0x1a, 2), rig.machine.routes()), (0, vec![message(0x40); 2]));
    // The vector does not exist: the driver reads that it got none.
    rig.write(0x1a, 2, 2);
    assert_eq!((rig.read(0x1a, 2), rig.machine.routes()), (0xffff, vec![message(0x40)]));
    rig.write(0x10, 2, 0x1234);
    assert_eq!((rig.read(0x10, 2), rig.machine.routes().len()), (0xffff, 0));
    assert_eq!(rig.device.handle().phase(), PhaseReport::Running);
}

#[test]
fn without_msix_the_pin_interrupts_and_msix_takes_over() {
    let rig = rig(1);
    rig.enable();
    assert_eq!(rig.config(0x3c) >> 8, 1, "INTA");
    rig.start_driver(1);
    rig.device.handle().peer_lost("gone");
    rig.bridge.lines().unwrap().serve();
    assert_eq!(rig.machine.take_raised(), [(21, 1)]);
    assert_eq!(rig.read(ISR, 1), 3);
    assert!(rig.machine.routes().is_empty());
    // Neither MSI-X nor the pin.
    rig.set_config(4, 0x406);
    let connected = || lock(&rig.device.state).sources.iter().filter(|source| source.line.is_some()).count();
    assert_eq!(connected(), 0);
    rig.set_config(4, 6);
    assert_eq!(connected(), 1, "the queue's is gone with the backend");
    rig.write(0x10, 2, 1);
    rig.msix_on(2);
    assert_eq!((connected(), rig.machine.routes()), (0, vec![message(0x41)]));
    rig.set_config(u64::from(rig.config(0x34)), 0);
    assert_eq!((connected(), rig.machine.routes().len()), (1, 0));
}

#[test]
fn no_line_is_used_before_the_driver_is_ready_nor_beside_msix() {
    let rig = rig(1);
    rig.enable();
    for offset in [1, 3, 0xb] {
        rig.write(0x14, 1, offset);
    }
    assert!(rig.machine.take_raised().is_empty(), "a line before DRIVER_OK");
    rig.msix_on(2);
    rig.start_driver(1);
    rig.write(0x14, 1, 0);
    rig.set_config(u64::from(rig.config(0x34)), 0);
    assert!(rig.machine.take_raised().is_empty(), "a line for a driver of MSI-X, or for none");
    rig.start_driver(1);
    assert_eq!(rig.machine.take_raised(), [(21, 0)]);
    let connected = || lock(&rig.device.state).sources.iter().filter(|source| source.line.is_some()).count();
    assert_eq!(connected(), 2);
    rig.write(0x14, 1, 0);
    assert_eq!(connected(), 0);
}

#[test]
fn configuration_is_read_through_the_device_and_its_changes_interrupt() {
    let rig = rig(1);
    rig.enable();
    rig.msix_on(2);
    rig.start_driver(1);
    assert_eq!(rig.read(DEVICE, 4), 0x0403_0201);
    let generation = rig.read(0x15, 1);
    lock(&rig.backend.0).config = (2..=61).collect();
    rig.device.handle().config_changed();
    assert_eq!(rig.read(DEVICE, 4), 0x0504_0302);
    assert_ne!(rig.read(0x15, 1), generation);
    assert_eq!(rig.machine.take_interrupts(), 1);
    assert_eq!(rig.read(ISR, 1), 3);
    assert_eq!(rig.read(ISR, 1) & 2, 0, "reading it acknowledged it");
}

#[test]
fn fields_read_in_any_width_and_are_written_in_their_own() {
    let rig = rig(2);
    rig.write(0x16, 2, 1);
    assert_eq!(rig.read(0x14, 4) >> 16, 1, "status, generation and selector in one read");
    assert_eq!(rig.read(0x12, 2), 2, "queues");
    rig.write(0x16, 2, 2);
    assert_eq!((rig.read(0x18, 2), rig.read(0x1a, 2), rig.read(0x1e, 2)), (0, 0xffff, 0), "no such queue");
    rig.write(0x16, 1, 0);
    assert_eq!(rig.read(0x16, 2), 2, "not its width");
    rig.write(0x38, 4, 1);
    assert_eq!(rig.read(0x38, 4), 0);
    // A driver may write 64 bits at once.
    rig.write(0x14, 1, 1);
    rig.write(0x14, 1, 3);
    rig.write(0x08, 4, 1);
    rig.write(0x0c, 4, 1);
    rig.write(0x14, 1, 0xb);
    rig.write(0x16, 2, 0);
    rig.device.bar_write(BarIndex::FIRST, 0x28, &0x1_2345_6780_u64.to_le_bytes());
    assert_eq!((rig.read(0x28, 4), rig.read(0x2c, 4)), (0x2345_6780, 1));
    // Only a reset disables a queue.
    rig.write(0x1c, 2, 1);
    rig.write(0x1c, 2, 0);
    assert_eq!(rig.read(0x1c, 2), 1);
}

#[test]
fn the_window_in_the_configuration_space_reaches_the_bar() {
    let rig = rig(1);
    let at = rig.capability(5);
    let reach = |offset: u32, length: u32| {
        rig.set_config(at + 8, offset);
        rig.set_config(at + 12, length);
    };
    reach(0x14, 1);
    rig.set_config(at + 16, 1);
    assert_eq!(rig.config(at + 16), 1);
    assert_eq!(rig.read(0x14, 1), 1, "the status");
    reach(0x12, 2);
    assert_eq!(rig.config(at + 16), 1, "queues");
    for (offset, length) in [(0x13, 2), (0, 3), (0, 0), (0, 8), (u32::MAX, 1), (0xffff_fffc, 4)] {
        reach(offset, length);
        assert_eq!(rig.config(at + 16), 0, "{offset:#x} {length}");
        rig.set_config(at + 16, u32::MAX);
    }
    reach(0x14, 1);
    rig.set_config(at + 4, 1);
    assert_eq!(rig.config(at + 16), 0, "no such BAR");
    assert_eq!(rig.read(0x14, 1), 1);
}

#[test]
fn device_whose_routes_are_refused_says_so_and_stays_quiet() {
    let rig = rig(1);
    rig.enable();
    rig.machine.refuse_routes();
    rig.msix_on(2);
    rig.start_driver(1);
    assert!(rig.machine.routes().is_empty());
    assert_ne!(rig.device.handle().phase(), PhaseReport::Running);
}

#[test]
fn lost_backend_is_told_by_the_configuration_s_vector() {
    let rig = rig(1);
    rig.enable();
    rig.msix_on(2);
    rig.start_driver(1);
    lock(&rig.backend.0).on_stop = Outcome::Lost;
    rig.device.handle().peer_lost("gone");
    assert_eq!(rig.read(0x14, 1), 0x4f, "NEEDS_RESET");
    assert_eq!(rig.machine.take_interrupts(), 1);
    assert!(rig.doorbells().is_empty());
}

#[test]
fn any_access_at_all_is_survived() {
    let rig = rig(2);
    rig.enable();
    rig.msix_on(3);
    rig.start_driver(2);
    for offset in (0..0x1_2000_u64).step_by(3) {
        for width in [1, 2, 4, 8] {
            let mut data = [0xa5; 8];
            rig.device.bar_read(BarIndex::FIRST, offset, &mut data[..width]);
            rig.device.bar_write(BarIndex::FIRST, offset, &[0xff; 8][..width]);
        }
    }
    for offset in 0..0x1000 {
        rig.device.config_write(offset, &[0xff]);
        rig.device.config_read(offset, &mut [0]);
    }
}
