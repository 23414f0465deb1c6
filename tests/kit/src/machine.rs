//! A whole machine in the test's own process, with the tiny kernel in it. This is the one file of the kit
//! that knows the library `vmm`: how a machine is configured, where its devices are in the guest, and how it
//! is watched.

use std::collections::VecDeque;
use std::fmt;
use std::path::Path;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, Once};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use arch::layout::{virtio_mmio_slot, virtio_mmio_slot_beside_pci};
use vmm::config::{Config, Image, OnReset, Serial, Socket, Transport, VhostUser};
use vmm::stats::Stats;
use vmm::tools::trace::Tracer;
use vmm::{Error, Event, Handle, Machine, Outcome};

use crate::kernel::{Answers, CommandLine, tiny_kernel};
use crate::served::lock;
use crate::wait;

/// How long one step of a machine may take on a quiet host: the limit of every wait that names none.
pub const STEP: Duration = Duration::from_secs(20);

/// A machine about to be started: the tiny kernel, its devices, one vCPU and 32 MiB.
pub struct TestMachine {
    config: Config,
    line: CommandLine,
    driven: Vec<usize>,
    console: Arc<Mutex<Vec<u8>>>,
    trace: Arc<Mutex<Vec<u8>>>,
}

impl TestMachine {
    /// The tiny kernel with this command line, which drives the first device.
    #[must_use]
    pub fn boot(line: CommandLine) -> Self {
        let mut config = Config::new(Image::Bytes(Arc::from(tiny_kernel())));
        config.memory.size = 32 << 20;
        let (serial, console) = Serial::buffer();
        config.serial = serial;
        let trace = Arc::new(Mutex::new(Vec::new()));
        let tracer = Tracer::to(Box::new(Lines(Arc::clone(&trace))));
        config.trace = Some(tracer);
        Self { config, line, driven: vec![0], console, trace }
    }

    /// Adds a virtio device of the type called `kind` (`blk`, `net`, `rng`, … `generic:ID`), whose backend
    /// listens on `socket`.
    ///
    /// # Panics
    /// When there is no such type.
    #[must_use]
    pub fn vhost_user(self, kind: &str, socket: &Path) -> Self {
        self.device(device(kind, Socket::Path(socket.to_owned())))
    }

    /// Adds a virtio device. [`device`] makes one to which more can be said.
    #[must_use]
    pub fn device(mut self, device: VhostUser) -> Self {
        self.config.vhost_user.push(device);
        self
    }

    /// The kernel drives these devices, counted from 0 in the order in which they were added, in place of the
    /// first one.
    #[must_use]
    pub fn driving(mut self, devices: impl IntoIterator<Item = usize>) -> Self {
        self.driven = devices.into_iter().collect();
        self
    }

    /// A reset by the guest starts it again. Without this a reset ends the machine.
    #[must_use]
    pub fn reboots(mut self) -> Self {
        self.config.on_reset = OnReset::Reboot;
        self
    }

    /// Changes anything else of the configuration.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Config)) -> Self {
        change(&mut self.config);
        self
    }

    /// Builds the machine and runs it on a thread of its own.
    ///
    /// # Panics
    /// When the machine cannot be built. [`TestMachine::try_start`] returns the error.
    #[must_use]
    pub fn start(self) -> RunningMachine {
        let trace = Arc::clone(&self.trace);
        self.try_start().unwrap_or_else(|error| {
            let mut text = Vec::new();
            error.report(&mut text).unwrap();
            panic!("{}{}", String::from_utf8_lossy(&text), section("the protocol", &text_of(&trace)))
        })
    }

    /// As [`TestMachine::start`], for a machine that may fail to start.
    ///
    /// # Errors
    /// Those of building the machine.
    pub fn try_start(mut self) -> Result<RunningMachine, Error> {
        keep_log();
        self.config.cmdline = Some(self.command_line().to_string());
        let machine = Machine::build(self.config)?;
        let handle = machine.handle();
        let events = handle.events();
        let thread = thread::spawn(move || machine.run());
        let (console, trace) = (self.console, self.trace);
        Ok(RunningMachine { thread: Some(thread), handle, events, console, trace })
    }

    /// Runs the machine until the guest ends it.
    ///
    /// # Panics
    /// When the machine cannot be built, fails, or does not end in time.
    #[must_use]
    pub fn run(self) -> EndedMachine {
        self.start().end()
    }

    /// The command line with the places of the devices that the kernel drives.
    fn command_line(&self) -> CommandLine {
        let devices = &self.config.vhost_user;
        let driven = self.driven.iter().filter_map(|&index| Some((index, devices.get(index)?)));
        driven.fold(self.line.clone(), |line, (index, device)| {
            let before =
                |transport| devices[..index].iter().filter(|other| other.transport == transport).count();
            match device.transport {
                Transport::Pci => line.pci_device(u8::try_from(1 + before(Transport::Pci)).unwrap()),
                Transport::Mmio => {
                    let slot =
                        if self.config.has_pci() { virtio_mmio_slot_beside_pci } else { virtio_mmio_slot };
                    let place =
                        slot(before(Transport::Mmio)).expect("a machine has room for that many devices");
                    line.device(place.base.0, place.gsi.0)
                }
            }
        })
    }
}

/// A virtio device of the type called `kind`, with everything else by default.
#[must_use]
pub fn device(kind: &str, socket: Socket) -> VhostUser {
    VhostUser::new(kind, socket)
}

impl fmt::Debug for TestMachine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestMachine").field("line", &self.line).finish_non_exhaustive()
    }
}

/// A machine on a thread of its own. Ended when dropped; a test that panics meanwhile prints what was seen of
/// the machine.
#[derive(Debug)]
pub struct RunningMachine {
    thread: Option<JoinHandle<Result<Outcome, Error>>>,
    handle: Handle,
    events: Receiver<Event>,
    console: Arc<Mutex<Vec<u8>>>,
    trace: Arc<Mutex<Vec<u8>>>,
}

impl RunningMachine {
    /// The console so far.
    #[must_use]
    pub fn console(&self) -> String {
        text_of(&self.console)
    }

    /// All messages so far that were exchanged with backends, one a line.
    #[must_use]
    pub fn trace(&self) -> String {
        text_of(&self.trace)
    }

    /// Waits for text on the console.
    ///
    /// # Panics
    /// When the text does not come in time.
    pub fn expect(&self, wanted: &str) {
        self.expect_within(wanted, STEP);
    }

    /// As [`RunningMachine::expect`], with a limit of its own ([`wait::patience`] stretches it).
    ///
    /// # Panics
    /// When the text does not come in time.
    pub fn expect_within(&self, wanted: &str, limit: Duration) {
        let found = wait::poll(limit, || self.console().contains(wanted).then_some(()));
        assert!(found.is_some(), "{wanted:?} did not come on the console");
    }

    /// Waits for the next event that `wanted` says yes to. Those before it are dropped.
    ///
    /// # Panics
    /// When there is none in time.
    pub fn expect_event(&self, what: &str, wanted: impl Fn(&Event) -> bool) -> Event {
        let mut others = Vec::new();
        let found = wait::poll(STEP, || {
            let event = self.events.try_recv().ok()?;
            if wanted(&event) {
                return Some(event);
            }
            others.push(event);
            None
        });
        found.unwrap_or_else(|| panic!("{what}: no such event; the others were {others:?}"))
    }

    /// What has been counted so far.
    ///
    /// # Panics
    /// When the machine has ended.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.handle.stats().expect("the machine runs")
    }

    /// Asks the machine to end, as Ctrl-A x does.
    pub fn quit(&self) {
        self.handle.quit();
    }

    /// Waits for the end of the machine.
    ///
    /// # Panics
    /// When the machine fails or does not end in time.
    #[must_use]
    pub fn end(self) -> EndedMachine {
        self.end_within(STEP)
    }

    /// As [`RunningMachine::end`], with a limit of its own.
    ///
    /// # Panics
    /// When the machine fails or does not end in time.
    #[must_use]
    pub fn end_within(mut self, limit: Duration) -> EndedMachine {
        let thread = self.thread.take().expect("a machine ends once");
        if wait::poll(limit, || thread.is_finished().then_some(())).is_none() {
            self.thread = Some(thread);
            panic!("the machine did not end within {:?}", wait::patience(limit));
        }
        let outcome = thread.join().unwrap().unwrap_or_else(|error| panic!("the machine failed: {error}"));
        EndedMachine { outcome, console: self.console(), trace: self.trace() }
    }

    fn evidence(&self) -> String {
        evidence(&self.console(), &self.trace())
    }
}

impl Drop for RunningMachine {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.evidence());
        }
        self.handle.quit();
        let Some(thread) = self.thread.take() else { return };
        if wait::poll(STEP, || thread.is_finished().then_some(())).is_none() {
            eprintln!("a machine did not end when it was asked to\n{}", self.evidence());
        }
    }
}

/// What remains of a machine. [`fmt::Display`] writes all of it, for the message of an assertion.
#[derive(Clone, Debug)]
pub struct EndedMachine {
    /// How the machine ended, and what was counted.
    pub outcome: Outcome,
    /// The console.
    pub console: String,
    /// All messages that were exchanged with backends, one a line.
    pub trace: String,
}

impl EndedMachine {
    /// What the tiny kernel printed.
    #[must_use]
    pub fn answers(&self) -> Answers<'_> {
        Answers::of(&self.console)
    }

    /// A number that the tiny kernel printed.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn number(&self, key: &str) -> u64 {
        self.answers().number(key).unwrap_or_else(|| panic!("no {key}= on the console\n{self}"))
    }
}

impl fmt::Display for EndedMachine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "--- ended: {:?}", self.outcome.end)?;
        f.write_str(&evidence(&self.console, &self.trace))
    }
}

fn evidence(console: &str, trace: &str) -> String {
    let log = lock(&LOG).iter().map(|line| format!("{line}\n")).collect::<String>();
    section("the log of all machines of this process", &log)
        + &section("the protocol", trace)
        + &section("the console", console)
        + "---"
}

/// The last lines of `text`, under a heading.
fn section(heading: &str, text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(40)..];
    format!("--- the end of {heading}\n{}\n", last.join("\n"))
}

fn text_of(bytes: &Mutex<Vec<u8>>) -> String {
    String::from_utf8_lossy(&lock(bytes)).into_owned()
}

/// Where the trace is written.
struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        lock(&self.0).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The last lines that machines of this process logged, for the evidence of a failure.
static LOG: Mutex<VecDeque<String>> = Mutex::new(VecDeque::new());

struct KeepLog;

impl log::Log for KeepLog {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Info
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            let mut lines = lock(&LOG);
            lines.push_back(format!("{}: {}", record.level(), record.args()));
            if lines.len() > 40 {
                lines.pop_front();
            }
        }
    }

    fn flush(&self) {}
}

/// Keeps the log, unless the test has a logger of its own.
fn keep_log() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if log::set_logger(&KeepLog).is_ok() {
            log::set_max_level(log::LevelFilter::Info);
        }
    });
}
