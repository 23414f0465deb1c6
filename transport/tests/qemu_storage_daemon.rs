//! Against a backend that we did not write: libvhost-user in Debian's qemu-storage-daemon, vhost-user-blk.

#![cfg(test)]

mod support;

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use support::fetched::{skipped, until_listening};
use support::queue::{Part, Queue};
use support::{GuestMemory, Peer, Scratch, eventually};
use transport::memory::DirtyLog;
use transport::memory::log_size;
use transport::memory::{GuestAddr, SharedRegion};
use transport::peer::{Cause, Limits};
use transport::vhost_user::features::bit;
use transport::vhost_user::{Connection, LiveSession, ProtocolFeatures, RingBase, Session, Wanted};

const SECTORS: u64 = 2048;

struct Daemon {
    process: Peer,
    socket: PathBuf,
    image: PathBuf,
    scratch: Scratch,
}

/// How fast the disk is.
#[derive(Clone, Copy)]
enum Speed {
    Full,
    /// One request a second, so that others are in flight meanwhile.
    Slow,
}

impl Daemon {
    /// `None`, with a printed reason, where the program is not installed.
    fn start() -> Option<Self> {
        let scratch = Scratch::new();
        let image = scratch.path("disk");
        let pattern: Vec<u8> = (0..SECTORS * 512).map(|n| (n / 512 % 251) as u8).collect();
        std::fs::write(&image, pattern).unwrap();
        let process = launch(&scratch, "s", Speed::Full)?;
        Some(Self { process, socket: scratch.path("s"), image, scratch })
    }

    /// Kills the daemon and starts another one on the same disk.
    fn replace(&mut self, socket: &str, speed: Speed) {
        self.process = launch(&self.scratch, socket, speed).unwrap();
        self.socket = self.scratch.path(socket);
    }

    fn connect(&self, wanted: &Wanted) -> Session {
        let limits = Limits::new(Duration::from_secs(5));
        let mut connection = None;
        // The socket file appears before the daemon listens on it.
        eventually("a connection", Duration::from_secs(10), || {
            match Connection::connect(&self.socket, &limits) {
                Ok(made) => connection = Some(made),
                Err(error) => assert!(error.is_absent(), "{error:?}"),
            }
            connection.is_some()
        });
        connection.unwrap().negotiate(wanted).unwrap()
    }
}

fn launch(scratch: &Scratch, socket: &str, speed: Speed) -> Option<Peer> {
    let mut command = Command::new("qemu-storage-daemon");
    let image = scratch.path("disk");
    command.args([
        "--blockdev",
        &format!("driver=file,node-name=file,filename={},locking=off", image.display()),
    ]);
    match speed {
        Speed::Full => command.args(["--blockdev", "driver=raw,node-name=d,file=file"]),
        Speed::Slow => command
            .args(["--object", "throttle-group,id=t,x-iops-total=1"])
            .args(["--blockdev", "driver=throttle,node-name=d,throttle-group=t,file=file"]),
    };
    let path = scratch.path(socket);
    let export = "type=vhost-user-blk,id=e,node-name=d,addr.type=unix,writable=on,num-queues=2";
    command.args(["--export", &format!("{export},addr.path={}", path.display())]);
    match command.stderr(Stdio::inherit()).spawn() {
        Ok(child) => {
            let process = Peer(child);
            until_listening(&path, Duration::from_secs(10));
            Some(process)
        }
        Err(error) => {
            skipped(&format!("qemu-storage-daemon does not start: {error}"));
            None
        }
    }
}

const REQUEST: u64 = 0x8000;

/// The guest's side of one queue.
struct Driver {
    memory: GuestMemory,
    queue: Queue,
}

impl Driver {
    fn new() -> Self {
        Self { memory: GuestMemory::new(2 << 20), queue: Queue::new(0, 0x1000) }
    }

    fn go_live(&self, session: Session, base: RingBase) -> LiveSession {
        let features = session.offered().accept(1 << bit::VERSION_1).unwrap();
        session.go_live(features, &self.memory.map, &[self.queue.ring(base)]).unwrap()
    }

    /// Makes a request available: 0 reads, 1 writes. `slot` is its place in memory and in the table.
    fn submit(&mut self, slot: u16, kind: u32, sector: u64, data: &[u8]) {
        let at = REQUEST + 0x2000 * u64::from(slot);
        let mut head = kind.to_le_bytes().to_vec();
        head.extend([0; 4]);
        head.extend(sector.to_le_bytes());
        self.memory.write(at, &head);
        self.memory.write(at + 0x1000, data);
        self.memory.write(at + 0x100, &[0xff]);
        let len = u32::try_from(data.len()).unwrap();
        let data = if kind == 0 { Part::Write(at + 0x1000, len) } else { Part::Read(at + 0x1000, len) };
        self.queue.offer(&self.memory, 3 * slot, &[Part::Read(at, 16), data, Part::Write(at + 0x100, 1)]);
    }

    fn used(&self) -> u16 {
        self.queue.used(&self.memory)
    }

    fn status(&self, slot: u16) -> u8 {
        self.memory.read(REQUEST + 0x2000 * u64::from(slot) + 0x100, 1)[0]
    }

    /// One request, from the kick to its data.
    fn request(&mut self, kind: u32, sector: u64, data: &[u8]) -> Vec<u8> {
        self.submit(0, kind, sector, data);
        self.queue.kick_and_wait(&self.memory);
        assert_eq!(self.status(0), 0, "status of the request");
        self.memory.read(REQUEST + 0x1000, data.len())
    }
}

#[test]
fn blocks_are_read_and_written_and_rings_stop_and_start_again() {
    let Some(daemon) = Daemon::start() else { return };
    let mut session = daemon.connect(&Wanted::default());
    assert!(session.protocol().contains(ProtocolFeatures::REPLY_ACK.with(ProtocolFeatures::CONFIG)));
    assert_eq!(session.queue_num(), 2);
    let config = session.read_config(256).unwrap();
    assert!(config.len() >= 36, "{} bytes", config.len());
    assert_eq!(config[..8], SECTORS.to_le_bytes());

    let mut driver = Driver::new();
    let live = driver.go_live(session, RingBase(0));
    assert_eq!(driver.request(0, 7, &[0; 512]), [7; 512]);
    driver.request(1, 9, &[0xab; 512]);
    assert_eq!(driver.request(0, 9, &[0; 512]), [0xab; 512]);
    assert!(driver.queue.call.take().unwrap() > 0, "the backend rang the call");

    let (session, bases) = live.stop().unwrap();
    assert_eq!(bases, [RingBase(3)]);
    let live = driver.go_live(session, bases[0]);
    assert_eq!(driver.request(0, 10, &[0; 512]), [10; 512]);
    let stats = live.stats();
    assert!(stats.failures == 0 && stats.sent > 20 && stats.answers > 5, "{stats:?}");

    // A guest reset begins anew at 0.
    let (session, _) = live.stop().unwrap();
    driver.queue.reset(&driver.memory);
    let live = driver.go_live(session, RingBase(0));
    assert_eq!(driver.request(0, 11, &[0; 512]), [11; 512]);
    assert_eq!(live.stop().unwrap().1, [RingBase(1)]);
}

#[test]
fn a_backend_without_protocol_features_serves_as_of_old() {
    let Some(daemon) = Daemon::start() else { return };
    let session = daemon.connect(&Wanted::default().adjust("-protocol_features").unwrap());
    assert_eq!(session.protocol(), ProtocolFeatures::NONE);
    let mut driver = Driver::new();
    let live = driver.go_live(session, RingBase(0));
    assert_eq!(driver.request(0, 3, &[0; 512]), [3; 512]);
    assert_eq!(live.stop().unwrap().1, [RingBase(1)]);
}

#[test]
fn a_second_connection_to_a_busy_backend_fails_by_deadline_with_a_hint() {
    let Some(daemon) = Daemon::start() else { return };
    let _first = daemon.connect(&Wanted::default());
    let limits = Limits::new(Duration::from_millis(200));
    let begin = std::time::Instant::now();
    let second = Connection::connect(&daemon.socket, &limits);
    let error = second.and_then(|second| second.negotiate(&Wanted::default())).err().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(10));
    println!("{error} ({:?})", error.hint());
    assert!(error.hint().is_some());
}

#[test]
fn writes_to_guest_memory_are_logged() {
    let Some(daemon) = Daemon::start() else { return };
    let session = daemon.connect(&Wanted::default());
    assert!(session.can_log());
    let mut driver = Driver::new();
    let mut live = driver.go_live(session, RingBase(0));
    let size = log_size(&driver.memory.map);
    let fd = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, size).unwrap();
    let ours = fd.try_clone().unwrap();
    let dirty = |page: u64| {
        let mut byte = [0];
        rustix::io::pread(&ours, &mut byte, page / 8).unwrap();
        byte[0] & 1 << (page % 8) != 0
    };
    // SET_LOG_BASE is answered with a value that is not 0, and that is no refusal.
    live.start_log(Arc::new(DirtyLog::new(fd, size, 0))).unwrap();
    live.notify_log(driver.queue.call.as_fd()).unwrap();
    assert_eq!(driver.request(0, 7, &[0; 512]), [7; 512]);
    assert!(dirty(driver.queue.used_ring() / 4096), "the used ring");
    assert!(dirty((REQUEST + 0x1000) / 4096), "the data");
    assert!(!dirty(0x10_0000 / 4096), "a page that nobody wrote");
    live.stop_log().unwrap();
    assert_eq!(driver.request(0, 8, &[0; 512]), [8; 512]);
    assert_eq!(live.stop().unwrap().1, [RingBase(2)]);
}

#[test]
fn requests_in_flight_when_the_backend_is_killed_are_finished_by_the_next_one() {
    let Some(mut daemon) = Daemon::start() else { return };
    // This one offers no inflight tracking, but finishes in order: the used index says where to go on.
    let wanted = Wanted::default();
    for round in 0..3u8 {
        daemon.replace(&format!("slow{round}"), Speed::Slow);
        let session = daemon.connect(&wanted);
        let mut driver = Driver::new();
        let live = driver.go_live(session, RingBase(0));
        assert!(live.inflight().is_none());
        for slot in 0..6 {
            driver.submit(slot, 1, 100 + u64::from(slot), &[0xc0 + round; 512]);
        }
        driver.queue.kick.ring().unwrap();
        eventually("the first request", Duration::from_secs(5), || driver.used() > 0);
        let done = driver.used();
        assert!(done < 6, "the disk is too fast for this test");

        // Killed with requests in flight: the connection says so at once.
        daemon.replace(&format!("full{round}"), Speed::Full);
        let lost = live.stop().err().unwrap();
        assert!(lost.error().is_fatal(), "{lost:?}");
        let session = daemon.connect(&wanted);
        let live = driver.go_live(session, RingBase(driver.used().into()));
        eventually("the other requests", Duration::from_secs(5), || driver.used() == 6);
        for slot in 0..6 {
            assert_eq!(driver.status(slot), 0);
        }
        let image = std::fs::read(&daemon.image).unwrap();
        assert_eq!(image[100 * 512..106 * 512], [0xc0 + round; 6 * 512]);
        assert_eq!(live.stop().unwrap().1, [RingBase(6)]);
    }
}

#[test]
fn memory_is_added_and_removed_while_the_device_runs() {
    let Some(daemon) = Daemon::start() else { return };
    let session = daemon.connect(&Wanted::default().and(ProtocolFeatures::CONFIGURE_MEM_SLOTS));
    println!("qemu-storage-daemon offers {}", session.offered_raw().1);
    let mut driver = Driver::new();
    let mut live = driver.go_live(session, RingBase(0));
    let more = GuestMemory::new(2 << 20);
    let fd = Arc::clone(more.map.regions()[0].shared_fd());
    let region = SharedRegion::new(GuestAddr(1 << 32), 2 << 20, fd, 0);
    live.add_region(&region).unwrap();
    assert_eq!(driver.request(0, 7, &[0; 512]), [7; 512]);
    live.remove_region(&region).unwrap();
    assert_eq!(driver.request(0, 9, &[0; 512]), [9; 512]);
}

#[test]
fn postcopy_is_advised_listened_for_told_its_memory_and_ended() {
    let Some(daemon) = Daemon::start() else { return };
    let mut session = daemon.connect(&Wanted::default().and(ProtocolFeatures::PAGEFAULT));
    let advised = match session.postcopy_advise() {
        Ok(advised) => advised,
        Err(error) => {
            skipped(&format!("no userfaultfd here: {error}"));
            assert!(matches!(error.cause(), Cause::Refused(_)), "{error:?}");
            return;
        }
    };
    session.postcopy_listen(&advised).unwrap();
    let memory = GuestMemory::new(2 << 20);
    let bases = session.postcopy_memory(&advised, &memory.map).unwrap();
    assert_eq!((bases.len(), bases[0].size), (1, 2 << 20));
    // Version 7.2 sends our own addresses back instead of its own: it changes a copy of the table.
    assert_ne!(bases[0].base, 0);
    session.postcopy_end(advised).unwrap();
    assert!(session.read_config(60).is_ok(), "still in step");
}

#[test]
fn a_stopped_backend_is_a_failure_only_when_a_deadline_passes() {
    let Some(daemon) = Daemon::start() else { return };
    let pid = rustix::process::Pid::from_child(&daemon.process.0);
    let limits = Limits::new(Duration::from_secs(2));
    let open = || {
        let mut connection = None;
        eventually("a connection", Duration::from_secs(10), || {
            connection = Connection::connect(&daemon.socket, &limits).ok();
            connection.is_some()
        });
        connection.unwrap().negotiate(&Wanted::default())
    };
    let mut session = open().unwrap();
    let stop = || rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let go_on = || rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    stop();
    let resumed = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    });
    session.read_config(60).unwrap();
    resumed.join().unwrap();

    stop();
    let begin = std::time::Instant::now();
    assert!(matches!(session.read_config(60).unwrap_err().cause(), Cause::Silent(_)));
    assert!(begin.elapsed() < Duration::from_secs(10));
    go_on();
    // It sees the hang-up, and takes the next one.
    eventually("a new session", Duration::from_secs(5), || {
        open().is_ok_and(|mut next| next.read_config(60).is_ok())
    });
}
