//! Tests of a whole device, from the guest's register writes to a backend that we did not write.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use transport::memory::GuestAddr;
use transport::peer::Limits;
use transport::vhost_user::Connection;

use super::*;
use crate::bus::BusDevice;
use crate::hang_up::HangUp;
use crate::testing::{Recorder, memory};
use crate::virtio::backend::requests::OwnChannel;
use crate::virtio::recovery::candidate::{Opened, open};
use crate::virtio::transport::mmio::{MmioDevice, Place};
use crate::virtio::{DeviceHandle, DeviceType, OnLoss, Parts, PhaseReport, Wishes};

const BASE: u64 = 0xd000_0000;
const SECTORS: u64 = 2048;

pub(in crate::virtio) fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(10), "{what}: did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// qemu-storage-daemon with a disk whose sectors are filled with their number.
pub(in crate::virtio) struct Daemon {
    child: Child,
    pub(in crate::virtio) folder: PathBuf,
}

impl Daemon {
    /// `None`, with a printed reason, where the program is not installed.
    pub(in crate::virtio) fn start(name: &str) -> Option<Self> {
        let folder = std::env::temp_dir().join(format!("outboard-devices-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let image: Vec<u8> = (0..SECTORS * 512).map(|n| u8::try_from(n / 512 % 251).unwrap()).collect();
        std::fs::write(folder.join("disk"), image).unwrap();
        match Self::spawn(&folder) {
            Ok(child) => Some(Self { child, folder }),
            Err(error) => {
                println!("skipped: qemu-storage-daemon does not start: {error}");
                None
            }
        }
    }

    fn spawn(folder: &Path) -> io::Result<Child> {
        Command::new("qemu-storage-daemon")
            .current_dir(folder)
            .args(["--blockdev", "driver=file,node-name=d,filename=disk"])
            .arg("--export")
            .arg("type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path=s,writable=on,num-queues=2")
            .stdin(Stdio::null())
            .spawn()
    }

    pub(in crate::virtio) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// After a kill: starts another daemon on the same disk.
    pub(in crate::virtio) fn start_again(&mut self) {
        std::fs::remove_file(self.folder.join("s")).unwrap();
        self.child = Self::spawn(&self.folder).unwrap();
    }

    pub(in crate::virtio) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(in crate::virtio) fn open(&self, order: &Order) -> Opened {
        self.open_within(order, Duration::from_secs(5))
    }

    pub(in crate::virtio) fn open_within(&self, order: &Order, deadline: Duration) -> Opened {
        let limits = Limits::new(deadline);
        let mut connection = None;
        eventually("a connection", || {
            connection = Connection::connect(&self.folder.join("s"), &limits).ok();
            connection.is_some()
        });
        open(connection.unwrap(), order).unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
        std::fs::remove_dir_all(&self.folder).unwrap();
    }
}

pub(in crate::virtio) fn order(features: &str) -> Order {
    let wishes = Wishes { queues: Some(2), ..Wishes::default() };
    Order::new(DeviceType::named("blk").unwrap(), wishes, features).unwrap()
}

/// The guest: registers through the page and the bus, rings through the shared memory.
pub(in crate::virtio) struct Guest {
    pub(in crate::virtio) device: MmioDevice,
    pub(in crate::virtio) machine: Recorder,
    ram: transport::memory::MemoryMap,
    next: AtomicU16,
    /// Which of the lower 32 features the driver takes.
    pub(in crate::virtio) takes: AtomicU32,
    /// Which of the upper ones.
    pub(in crate::virtio) takes_high: AtomicU32,
}

const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const HEAD: u64 = 0x8000;

impl Guest {
    pub(in crate::virtio) fn new(opened: Opened) -> (Self, Option<OwnChannel>, Arc<HangUp>) {
        Self::on_loss(opened, OnLoss::Break)
    }

    pub(in crate::virtio) fn on_loss(
        opened: Opened,
        on_loss: OnLoss,
    ) -> (Self, Option<OwnChannel>, Arc<HangUp>) {
        let Opened { model, backend, channel, hang_up, outlets, .. } = opened;
        let (machine, ram) = (Recorder::default(), memory());
        let service = crate::virtio::served::service_of(&model);
        let parts = Parts {
            name: "disk0".into(),
            model,
            backend: Box::new(backend),
            memory: ram.clone(),
            outlets,
            service,
        };
        let place = Place { base: GuestAddr(BASE), gsi: 5 };
        let device = MmioDevice::new(&DeviceHandle::new(parts).unwrap(), place, &machine.ports()).unwrap();
        device.handle().on_loss(on_loss);
        (
            Self {
                device,
                machine,
                ram,
                next: AtomicU16::new(0),
                takes: AtomicU32::new(0xffff),
                takes_high: AtomicU32::new(1),
            },
            channel,
            hang_up,
        )
    }

    pub(in crate::virtio) fn write(&self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    pub(in crate::virtio) fn store(&self, at: u64, bytes: &[u8]) {
        rustix::io::pwrite(self.ram.regions()[0].fd(), bytes, at).unwrap();
    }

    pub(in crate::virtio) fn load(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        rustix::io::pread(self.ram.regions()[0].fd(), &mut bytes, at).unwrap();
        bytes
    }

    /// Kicks queue 0. Returns whether the notification ended in the kernel.
    pub(in crate::virtio) fn kick(&self) -> bool {
        self.machine.guest_writes(BASE + 0x50, 0)
    }

    /// Does the steps of a stock driver up to DRIVER_OK, with one queue of 16 entries.
    pub(in crate::virtio) fn start_driver(&self) {
        self.start_driver_with(16, [DESC, AVAIL, USED]);
    }

    /// Does the steps of a stock driver up to DRIVER_OK, with one queue of `size` entries at these addresses.
    pub(in crate::virtio) fn start_driver_with(&self, size: u16, areas: [u64; 3]) {
        areas.iter().for_each(|area| self.store(*area, &[0; 0x1000]));
        self.next.store(0, Relaxed);
        for status in [0, 1, 3] {
            self.write(0x70, status);
        }
        for select in [1, 0] {
            self.write(0x14, select);
            self.write(0x24, select);
            // Neither event index nor indirect descriptors nor packed rings.
            let keep = if select == 1 { &self.takes_high } else { &self.takes }.load(Relaxed);
            self.write(0x20, self.machine.page_u32(0x10) & keep);
        }
        self.write(0x70, 0xb);
        assert_eq!(self.machine.page_u32(0x70), 0xb);
        self.write(0x30, 0);
        self.write(0x38, size.into());
        for (offset, address) in [0x80, 0x90, 0xa0].into_iter().zip(areas) {
            self.write(offset, u32::try_from(address).unwrap());
        }
        self.write(0x44, 1);
        self.write(0x70, 0xf);
    }

    fn descriptor(&self, index: u64, at: u64, length: u32, flags: u16) {
        let next = u16::try_from(index + 1).unwrap();
        let bytes = [&at.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
        self.store(DESC + 16 * index, &bytes.concat());
    }

    pub(in crate::virtio) fn ram(&self) -> &transport::memory::MemoryMap {
        &self.ram
    }

    /// Reads a sector as a driver does. The notification ends in the kernel.
    pub(in crate::virtio) fn read_sector(&self, sector: u64) -> Vec<u8> {
        self.read_sector_to(sector, HEAD + 0x1000);
        self.load(HEAD + 0x1000, 512)
    }

    /// Reads a sector to the address `to`.
    pub(in crate::virtio) fn read_sector_to(&self, sector: u64, to: u64) {
        self.store(HEAD, &[[0; 8], sector.to_le_bytes()].concat());
        self.store(HEAD + 0x2000, &[0xff]);
        self.descriptor(0, HEAD, 16, 1);
        self.descriptor(1, to, 512, 3);
        self.descriptor(2, HEAD + 0x2000, 1, 2);
        let next = self.next.fetch_add(1, Relaxed).wrapping_add(1);
        self.store(AVAIL + 2, &next.to_le_bytes());
        assert!(self.kick(), "the kick must end in the kernel");
        eventually("a used buffer", || self.load(USED + 2, 2) == next.to_le_bytes());
        eventually("an interrupt", || self.machine.take_interrupts() > 0);
        assert!(self.machine.guest_writes(BASE + 0x64, 1), "so must the acknowledgement");
        assert_eq!(self.load(HEAD + 0x2000, 1), [0], "status of the request");
    }
}

#[test]
fn disk_of_qemu_storage_daemon_reads_through_the_device_over_many_resets() {
    let Some(daemon) = Daemon::start("reads") else { return };
    let (guest, _channel, _hang_up) = Guest::new(daemon.open(&order("")));
    assert_eq!(guest.machine.page_bytes(0x100, 8), SECTORS.to_le_bytes());
    assert_eq!(guest.machine.page_bytes(0x100 + 34, 2), [2, 0]);
    for round in 0..10 {
        guest.start_driver();
        assert_eq!(guest.machine.page_u32(0x70), 0xf, "round {round}");
        for sector in [0, 7, SECTORS - 1] {
            let expected = u8::try_from(sector % 251).unwrap();
            assert_eq!(guest.read_sector(sector), [expected; 512], "round {round} sector {sector}");
        }
        if round % 2 == 0 {
            guest.write(0x70, 0);
        } else {
            guest.device.handle().machine_reset();
        }
        assert_eq!(guest.machine.page_u32(0x70), 0);
    }
    let stats = guest.device.handle().stats();
    assert_eq!((stats.activations, stats.resets), (10, 10));
    assert_eq!((stats.trapped.queue_notify, stats.trapped.interrupt_ack), (0, 0));
    assert!(stats.backend.messages > 100 && stats.backend.failures == 0, "{:?}", stats.backend);
}

#[test]
fn write_back_byte_written_by_the_driver_reaches_the_backend() {
    let Some(daemon) = Daemon::start("wce") else { return };
    let (guest, _channel, _hang_up) = Guest::new(daemon.open(&order("")));
    guest.start_driver();
    for value in [0, 1, 0] {
        guest.device.write(0x100 + 32, &[value]);
        assert_eq!(guest.machine.page_bytes(0x100 + 32, 1), [value]);
    }
    assert_eq!(guest.device.handle().phase(), PhaseReport::Running);
}

#[test]
fn daemon_that_dies_is_seen_on_the_hang_up_descriptor_and_the_guest_can_still_reset() {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let Some(mut daemon) = Daemon::start("dies") else { return };
    let (guest, _channel, hang_up) = Guest::new(daemon.open(&order("")));
    guest.start_driver();
    daemon.child.kill().unwrap();
    let mut fds = [PollFd::new(&hang_up, PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&Timespec { tv_sec: 5, tv_nsec: 0 })).unwrap(), 1);
    let begin = Instant::now();
    guest.write(0x70, 0);
    assert!(begin.elapsed() < Duration::from_secs(5), "a deadline passed");
    assert_eq!(guest.machine.page_u32(0x70), 0);
    assert!(matches!(guest.device.handle().phase(), PhaseReport::Broken(_)));
    // The connection is closed on our side, too, so no hang-up is reported again.
    hang_up.take();
    assert_eq!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap(), 0);
}
