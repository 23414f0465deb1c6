use super::*;

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicU32;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use devices::bus::{Bus, BusDevice};
use kvm_bindings::kvm_regs;
use kvm_ioctls::VmFd;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{Bytes, VolatileMemory};

use crate::host::mapping::Mapping;
use crate::life::gate::Lifecycle;
use crate::life::vcpu::{Vcpu, VcpuCounters, Vcpus};

/// The guest address at which the tests show a piece of one page.
const PIECE: u64 = 0x8000;

/// `mov al, [0x8000]; out 0x10, al; jmp` back.
const READING: &[u8] = &[0xa0, 0x00, 0x80, 0xe6, 0x10, 0xeb, 0xf9];
/// `inc al; mov [0x8000], al; out 0x10, al; jmp` back.
const WRITING: &[u8] = &[0xfe, 0xc0, 0xa2, 0x00, 0x80, 0xe6, 0x10, 0xeb, 0xf7];

/// A memfd of two pages of `byte`.
fn file(byte: u8) -> Arc<OwnedFd> {
    let mut file = File::from(memfd_create("peer", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(&[byte; 0x2000]).unwrap();
    Arc::new(file.into())
}

/// Its second page.
fn second_page(fd: &Arc<OwnedFd>) -> FileRange {
    FileRange { fd: Arc::clone(fd), offset: PAGE, size: PAGE }
}

struct Port(Sender<u8>);

impl BusDevice for Port {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write(&self, _: u64, data: &[u8]) {
        if self.0.send(data[0]).is_err() {
            println!("nobody listens any more");
        }
    }
}

struct Guest {
    memory: Arc<PeerMemory>,
    mmio: Arc<Bus>,
    vm: Arc<VmFd>,
    lifecycle: Arc<Lifecycle>,
    said: Receiver<u8>,
    vcpus: Option<Vcpus>,
    code: Mapping,
    ports: Arc<Bus>,
    _ram: Slot,
}

impl Guest {
    /// A guest of 8 KiB that writes bytes to a port. Where there is no KVM: `None`, with the reason printed.
    fn new() -> Option<Self> {
        let kvm = match crate::host::kvm::open() {
            Ok(kvm) => kvm,
            Err(error) => {
                println!("skipped: {error}");
                return None;
            }
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        let slots = Slots::new(Arc::clone(&vm), crate::host::kvm::slot_limit(&kvm));
        let code = Mapping::anonymous(0x2000).unwrap();
        let ram = slots.add(0, code.clone(), Access::ReadWrite).unwrap();
        let (said, hear) = channel();
        let mut ports = Bus::new();
        ports.insert(0x10, 1, "port", Arc::new(Port(said))).unwrap();
        let mut mmio = Bus::new();
        mmio.insert(PIECE, PAGE, "piece", Arc::new(Port(channel().0))).unwrap();
        Some(Self {
            memory: PeerMemory::new(slots).unwrap(),
            mmio: Arc::new(mmio),
            vm,
            lifecycle: Arc::new(Lifecycle::new().unwrap()),
            said: hear,
            vcpus: None,
            code,
            ports: Arc::new(ports),
            _ram: ram,
        })
    }

    fn run(&mut self, code: &[u8]) {
        self.code.region().as_volatile_slice().write_slice(code, 0x1000).unwrap();
        let fd = self.vm.create_vcpu(0).unwrap();
        let mut sregs = fd.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        fd.set_sregs(&sregs).unwrap();
        fd.set_regs(&kvm_regs { rip: 0x1000, rflags: 2, ..Default::default() }).unwrap();
        let mut vcpus = Vcpus::new(Arc::clone(&self.lifecycle), [fd]);
        let vcpu = Vcpu {
            fd: Arc::clone(&vcpus.fds()[0]),
            index: 0,
            pio: Arc::clone(&self.ports),
            mmio: Arc::clone(&self.mmio),
            lifecycle: Arc::clone(&self.lifecycle),
            peer_memory: Arc::clone(&self.memory),
            counters: Arc::new(VcpuCounters::default()),
            faults: 0,
            begun: Instant::now(),
        };
        vcpus.start(vcpu).unwrap();
        self.vcpus = Some(vcpus);
        self.lifecycle.open();
    }

    /// Waits until the guest writes `byte` to the port.
    fn expect(&self, byte: u8) {
        let until = Instant::now() + Duration::from_secs(60);
        let mut last = None;
        while Instant::now() < until {
            match self.said.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(said) if said == byte => return,
                Ok(said) => last = Some(said),
                Err(_) => panic!("the guest is silent: {:?}", self.lifecycle.take_request()),
            }
        }
        panic!("the guest never said {byte:#x}, last {last:x?}");
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some(mut vcpus) = self.vcpus.take() {
            vcpus.end(|| {});
        }
    }
}

fn cause(error: &PortError) -> String {
    std::error::Error::source(error).unwrap().to_string()
}

fn counter() -> (Arc<AtomicU32>, OnVanished) {
    let count = Arc::new(AtomicU32::new(0));
    let seen = Arc::clone(&count);
    let vanished = Arc::new(move || {
        seen.fetch_add(1, Ordering::Relaxed);
    });
    (count, vanished)
}

#[test]
fn truncated_file_vanishes_from_the_running_guest_which_goes_on() {
    let Some(mut guest) = Guest::new() else { return };
    let fd = file(0x42);
    let (vanished, tell) = counter();
    let guard = guest.memory.show(&second_page(&fd), GuestAddr(PIECE), Access::ReadWrite, tell).unwrap();
    guest.run(READING);
    guest.expect(0x42);
    assert_eq!(vanished.load(Ordering::Relaxed), 0);
    ftruncate(&fd, PAGE).unwrap();
    guest.expect(0xff);
    assert_eq!(vanished.load(Ordering::Relaxed), 1);
    assert!(guest.mmio.counters().ranges[0].reads > 0, "the bus answers now");
    // The peer makes the file long again, which changes nothing. The address is free for another piece.
    ftruncate(&fd, 2 * PAGE).unwrap();
    let (_, tell) = counter();
    let other = guest.memory.show(&second_page(&file(7)), GuestAddr(PIECE), Access::ReadWrite, tell).unwrap();
    guest.expect(7);
    drop(guard);
    guest.expect(7);
    drop(other);
    guest.expect(0xff);
    assert_eq!(guest.lifecycle.take_request(), None, "the machine lives");
}

#[test]
fn file_that_ends_within_a_page_is_shown_with_that_page() {
    let Some(mut guest) = Guest::new() else { return };
    let fd = file(0x42);
    ftruncate(&fd, PAGE + 1).unwrap();
    let (vanished, tell) = counter();
    let guard = guest.memory.show(&second_page(&fd), GuestAddr(PIECE), Access::ReadWrite, tell).unwrap();
    guest.run(READING);
    guest.expect(0x42);
    assert_eq!(guest.memory.remove(Suspects::Lost), 0);
    assert_eq!(vanished.load(Ordering::Relaxed), 0);
    drop(guard);
}

#[test]
fn file_truncated_under_a_writing_guest_vanishes_too() {
    let Some(mut guest) = Guest::new() else { return };
    let fd = file(0);
    let (vanished, tell) = counter();
    let guard = guest.memory.show(&second_page(&fd), GuestAddr(PIECE), Access::ReadWrite, tell).unwrap();
    guest.run(WRITING);
    guest.expect(9);
    let mut seen = [0];
    File::from(fd.try_clone().unwrap()).read_exact_at(&mut seen, PAGE).unwrap();
    assert_ne!(seen, [0], "the guest writes to the peer's file");
    ftruncate(&fd, 0).unwrap();
    guest.expect(3);
    guest.expect(2);
    assert_eq!(vanished.load(Ordering::Relaxed), 1);
    assert!(guest.mmio.counters().ranges[0].writes > 0);
    assert_eq!(guest.lifecycle.take_request(), None, "the machine lives");
    drop(guard);
}

#[test]
fn writes_to_a_read_only_piece_come_to_the_bus() {
    let Some(mut guest) = Guest::new() else { return };
    let fd = file(0x42);
    let (_, tell) = counter();
    // A file that is open for reading only is enough.
    let read_only = File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&*fd))).unwrap();
    let piece = FileRange { fd: Arc::new(read_only.into()), ..second_page(&fd) };
    let refused =
        guest.memory.show(&piece, GuestAddr(PIECE), Access::ReadWrite, Arc::clone(&tell)).unwrap_err();
    assert!(refused.to_string().contains("cannot map 0x1000 bytes"), "{refused}");
    let guard = guest.memory.show(&piece, GuestAddr(PIECE), Access::ReadOnly, tell).unwrap();
    guest.run(WRITING);
    guest.expect(9);
    let counters = guest.mmio.counters();
    assert!(counters.ranges[0].writes > 0 && counters.ranges[0].reads == 0);
    let mut seen = [0];
    File::from(fd.try_clone().unwrap()).read_exact_at(&mut seen, PAGE).unwrap();
    assert_eq!(seen, [0x42]);
    drop(guard);
}

#[test]
fn our_own_memory_sent_back_is_shown_like_any_other() {
    use rustix::fs::{SealFlags, fcntl_add_seals};
    let Some(mut guest) = Guest::new() else { return };
    // Guest memory as `arch::ram` makes it: a peer that was given the memory's file offers it as a file of
    // its own.
    let ram = memfd_create("guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&ram, 0x20_0000).unwrap();
    fcntl_add_seals(&ram, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).unwrap();
    let mapping = Mapping::shared(&ram, 0, 0x20_0000).unwrap();
    let slot = guest.memory.slots.add(0x20_0000, mapping.clone(), Access::ReadWrite).unwrap();
    let returned = Arc::new(ram.try_clone().unwrap());
    let piece = FileRange { fd: Arc::clone(&returned), offset: PAGE, size: PAGE };
    let (vanished, tell) = counter();
    let guard = guest.memory.show(&piece, GuestAddr(PIECE), Access::ReadWrite, tell).unwrap();
    guest.run(WRITING);
    guest.expect(9);
    let byte: u8 = mapping.region().as_volatile_slice().read_obj(0x1000).unwrap();
    assert_ne!(byte, 0, "both places are the same memory");
    assert!(ftruncate(&returned, 0).is_err(), "it is sealed");
    assert_eq!(guest.memory.remove(Suspects::Lost), 0);
    drop(guard);
    guest.expect(0xff);
    drop(slot);
    assert_eq!((vanished.load(Ordering::Relaxed), Arc::strong_count(&returned)), (0, 2));
    assert_eq!(guest.lifecycle.take_request(), None, "the machine lives");
}

#[test]
fn pieces_that_cannot_be_are_refused_and_leave_nothing_behind() {
    let Some(guest) = Guest::new() else { return };
    let fd = file(1);
    let show = |offset, size, at| {
        let piece = FileRange { fd: Arc::clone(&fd), offset, size };
        guest.memory.show(&piece, GuestAddr(at), Access::ReadWrite, counter().1)
    };
    for (offset, size, at) in
        [(1, PAGE, PIECE), (0, 1, PIECE), (0, 0, PIECE), (0, PAGE, 1), (0, 2 * PAGE, u64::MAX - PAGE + 1)]
    {
        let refused = show(offset, size, at).unwrap_err();
        assert!(cause(&refused).contains("not whole pages"), "{offset:#x} {size:#x} {at:#x}: {refused}");
    }
    for (offset, size) in [(PAGE, 2 * PAGE), (2 * PAGE, PAGE), (1 << 52, PAGE), (0, 1 << 62)] {
        let refused = show(offset, size, PIECE).unwrap_err();
        assert!(cause(&refused).contains("the file ends before"), "{offset:#x} {size:#x}: {refused}");
    }
    let wraps = show(u64::MAX - PAGE + 1, PAGE, PIECE).unwrap_err();
    assert!(cause(&wraps).contains("not whole pages"), "{wraps}");
    // RAM is at that address.
    assert!(show(0, PAGE, 0x1000).unwrap_err().to_string().contains("at guest address 0x1000"));
    let (pipe, _) = rustix::pipe::pipe().unwrap();
    let piece = FileRange { fd: Arc::new(pipe), offset: 0, size: PAGE };
    let refused = guest.memory.show(&piece, GuestAddr(PIECE), Access::ReadWrite, counter().1).unwrap_err();
    assert!(cause(&refused).contains("not mapped into guests"), "{refused}");
    // The refused pieces occupy neither the address nor a slot.
    let guards: Vec<_> = (0..2).map(|n| show(0, PAGE, PIECE + n * PAGE).unwrap()).collect();
    drop(guards);
    assert!(Arc::strong_count(&fd) == 1, "the file is let go");
}

/// Whether the timer ticks within half a second.
fn ticks(memory: &PeerMemory) -> bool {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut fds = [PollFd::from_borrowed_fd(memory.timer(), PollFlags::IN)];
    let half = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };
    poll(&mut fds, Some(&half)).unwrap() > 0
}

#[test]
fn pieces_of_files_that_can_get_shorter_are_looked_at_and_no_others() {
    use rustix::fs::fcntl_add_seals;
    let Some(guest) = Guest::new() else { return };
    assert!(!ticks(&guest.memory), "there is nothing to look at");
    let sealed = memfd_create("sealed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&sealed, PAGE).unwrap();
    fcntl_add_seals(&sealed, SealFlags::SHRINK).unwrap();
    let piece = FileRange { fd: Arc::new(sealed), offset: 0, size: PAGE };
    let _sealed = guest.memory.show(&piece, GuestAddr(PIECE), Access::ReadWrite, counter().1).unwrap();
    assert!(!ticks(&guest.memory), "the file cannot get shorter");
    let (short, other) = (file(1), file(1));
    let (vanished, tell) = counter();
    let (innocent, tell_other) = counter();
    let shown =
        guest.memory.show(&second_page(&short), GuestAddr(PIECE + PAGE), Access::ReadWrite, tell).unwrap();
    let _other = guest
        .memory
        .show(&second_page(&other), GuestAddr(PIECE + 2 * PAGE), Access::ReadWrite, tell_other)
        .unwrap();
    assert!(ticks(&guest.memory));
    guest.memory.look();
    assert_eq!(vanished.load(Ordering::Relaxed), 0);
    ftruncate(&short, PAGE).unwrap();
    assert!(ticks(&guest.memory));
    guest.memory.look();
    assert_eq!((vanished.load(Ordering::Relaxed), innocent.load(Ordering::Relaxed)), (1, 0));
    drop((shown, _other));
    guest.memory.look();
    assert!(!ticks(&guest.memory), "only the sealed one is left");
}

#[test]
fn memory_without_pages_is_refused_at_the_door() {
    let Some(guest) = Guest::new() else { return };
    let piece = |fd| FileRange { fd: Arc::new(fd), offset: 0, size: PAGE };
    let refused = |fd| {
        let shown = guest.memory.show(&piece(fd), GuestAddr(PIECE), Access::ReadWrite, counter().1);
        cause(&shown.unwrap_err())
    };
    // A file that is on neither tmpfs nor hugetlbfs, like those of `memfd_secret` and FUSE.
    let plain = File::open("/proc/self/exe").unwrap();
    assert!(refused(plain.into()).contains("not mapped into guests"));
}

#[test]
fn only_the_piece_that_cannot_be_read_is_blamed() {
    let Some(guest) = Guest::new() else { return };
    let (bad, good) = (file(1), file(1));
    let (blamed, tell) = counter();
    let (innocent, tell_other) = counter();
    let show =
        |fd, at, tell| guest.memory.show(&second_page(fd), GuestAddr(at), Access::ReadWrite, tell).unwrap();
    let _guards = (show(&bad, PIECE, tell), show(&good, PIECE + PAGE, tell_other));
    ftruncate(&bad, PAGE).unwrap();
    assert_eq!(guest.memory.remove(Suspects::Unreadable), 1);
    assert_eq!((blamed.load(Ordering::Relaxed), innocent.load(Ordering::Relaxed)), (1, 0));
    // No piece is found at fault, so the only piece is removed.
    assert_eq!(guest.memory.remove(Suspects::Unreadable), 1);
    assert_eq!(innocent.load(Ordering::Relaxed), 1);
}

/// Needs a tmpfs of one page, and is skipped where it cannot be mounted.
#[test]
fn a_hole_that_a_full_file_system_cannot_fill_is_found() {
    use std::process::Command;
    let Some(guest) = Guest::new() else { return };
    let mount = std::env::temp_dir().join(format!("outboard-tmpfs-{}", std::process::id()));
    std::fs::create_dir_all(&mount).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=16k", "tmpfs"]).arg(&mount).output();
    if !mounted.as_ref().is_ok_and(|done| done.status.success()) {
        println!("skipped: no file system can be mounted here: {mounted:?}");
        return;
    }
    let file =
        File::options().read(true).write(true).create(true).truncate(true).open(mount.join("bar")).unwrap();
    file.set_len(2 * PAGE).unwrap();
    let fd: Arc<OwnedFd> = Arc::new(file.into());
    let (vanished, tell) = counter();
    let shown = guest.memory.show(&second_page(&fd), GuestAddr(PIECE), Access::ReadWrite, tell).unwrap();
    guest.memory.look();
    assert_eq!(vanished.load(Ordering::Relaxed), 0, "there is room for its page");
    let mut filler = File::create(mount.join("filler")).unwrap();
    let mut written = 0;
    while filler.write(&[1; 4096]).is_ok_and(|count| count > 0) {
        written += 1;
    }
    guest.memory.look();
    assert_eq!(vanished.load(Ordering::Relaxed), 1, "{written} pages filled the rest");
    drop((shown, fd));
    assert!(Command::new("umount").arg("-l").arg(&mount).status().unwrap().success());
    std::fs::remove_dir(&mount).unwrap();
}
