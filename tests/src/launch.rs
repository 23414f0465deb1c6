//! The program under test in a process of its own: started, watched, ended, and its last words kept.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use arch::layout::virtio_mmio_slot;
use rustix::process::{Pid, Signal, kill_process};

pub use outboard_testkit::machine::STEP;

use crate::capture::{Capture, tail};
use crate::payload::{self, CommandLine};
use crate::place;
use crate::scratch::Scratch;
use crate::stats::Stats;
use crate::wait;

const STATS: &str = "stats.json";
const TRACE: &str = "trace";

/// A command line about to be run.
#[derive(Debug)]
pub struct Launch {
    program: OsString,
    arguments: Vec<OsString>,
    scratch: Rc<Scratch>,
    /// Where the tiny kernel is.
    _image: Option<Scratch>,
    stdin: Option<OwnedFd>,
}

impl Launch {
    /// `outboard` with these arguments and nothing else.
    pub fn new(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        Self::program(place::outboard(), arguments)
    }

    /// Another program, which is to start `outboard`.
    pub fn program(
        program: impl AsRef<OsStr>,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Self {
        let program = program.as_ref().to_owned();
        let scratch = Rc::new(Scratch::new());
        Self { program, arguments: Vec::new(), scratch, _image: None, stdin: None }.args(arguments)
    }

    /// `outboard run --kernel … --cmdline …`, with statistics and a trace of the protocol.
    #[must_use]
    pub fn kernel(kernel: &Path, cmdline: &str) -> Self {
        let launch = Self::new(["run", "-v"]);
        let [stats, trace] = [STATS, TRACE].map(|name| launch.scratch.path(name));
        let launch = launch.arg("--kernel").arg(kernel).arg("--cmdline").arg(cmdline);
        launch.arg("--stats").arg(stats).arg("--trace").arg(trace)
    }

    /// The tiny kernel with a command line.
    ///
    /// # Panics
    /// When it cannot be written.
    #[must_use]
    pub fn payload(line: &CommandLine) -> Self {
        let image = Scratch::new();
        let kernel = payload::write_tiny_kernel(image.folder()).unwrap();
        Self { _image: Some(image), ..Self::kernel(&kernel, &line.to_string()) }
    }

    /// Only what goes wrong on standard error.
    #[must_use]
    pub fn without_log(mut self) -> Self {
        self.arguments.retain(|argument| argument != "-v");
        self
    }

    /// Started by a shell that first does `script`, and then has `"$0" "$@"` for the program and its
    /// arguments.
    #[must_use]
    pub fn by_shell(mut self, script: &str) -> Self {
        let program = std::mem::replace(&mut self.program, "sh".into());
        self.arguments.splice(0..0, ["-c".into(), script.into(), program]);
        self
    }

    /// No trace of the protocol.
    #[must_use]
    pub fn without_trace(mut self) -> Self {
        if let Some(at) = self.arguments.iter().position(|argument| argument == "--trace") {
            self.arguments.drain(at..at + 2);
        }
        self
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args(mut self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Adds a virtio-blk device with this backend.
    #[must_use]
    pub fn disk(self, socket: &Path) -> Self {
        self.arg("--vhost-user").arg(format!("blk,socket={}", socket.display()))
    }

    /// Adds a virtio-blk device with this backend, and these keys.
    #[must_use]
    pub fn disk_with(self, socket: &Path, keys: &str) -> Self {
        self.arg("--vhost-user").arg(format!("blk,socket={},{keys}", socket.display()))
    }

    /// Gives it this as standard input, output included: a terminal.
    #[must_use]
    pub fn on_terminal(mut self, terminal: OwnedFd) -> Self {
        self.stdin = Some(terminal);
        self
    }

    /// A folder that lives as long as the machine.
    #[must_use]
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// Starts it.
    ///
    /// # Panics
    /// When the program cannot be started.
    #[must_use]
    pub fn start(self) -> Vm {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stderr(Stdio::piped());
        match &self.stdin {
            Some(terminal) => {
                command.stdin(terminal.try_clone().unwrap()).stdout(terminal.try_clone().unwrap());
            }
            None => {
                command.stdin(Stdio::piped()).stdout(Stdio::piped());
            }
        }
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", self.program.display()));
        Vm {
            stdin: child.stdin.take(),
            console: child.stdout.take().map(Capture::new),
            log: Capture::new(child.stderr.take().unwrap()),
            child,
            status: None,
            begun: Instant::now(),
            launch: self,
        }
    }

    /// Starts it and waits for its end.
    #[must_use]
    pub fn run(self) -> Ended {
        self.start().end(STEP)
    }
}

/// A running `outboard`. Killed when dropped; a test that panics meanwhile prints what was seen of it.
#[derive(Debug)]
pub struct Vm {
    child: Child,
    stdin: Option<ChildStdin>,
    console: Option<Capture>,
    log: Capture,
    status: Option<ExitStatus>,
    begun: Instant,
    launch: Launch,
}

impl Vm {
    /// Waits for text on the console and returns everything up to and with it.
    ///
    /// # Panics
    /// When it does not come.
    pub fn expect(&self, wanted: &str) -> String {
        let console = self.console();
        match console.find(wanted, 0, STEP) {
            Ok(end) => console.text().get(..end).map_or_else(|| console.text(), str::to_owned),
            Err(why) => panic!("on the console {why}"),
        }
    }

    /// The messages that were sent to the backend at `socket` so far, as `--trace` has them.
    fn sent(&self, socket: &Path) -> Vec<String> {
        let trace = fs::read_to_string(self.launch.scratch.path(TRACE)).unwrap_or_default();
        let mark = format!("  {} > ", socket.display());
        trace
            .lines()
            .filter_map(|line| line.split_once(&mark))
            .map(|(_, message)| message.to_owned())
            .collect()
    }

    /// How often a connection to the backend at `socket` has begun. A backend with REPLY_ACK is asked for its
    /// features first of all, and again after its rings were enabled.
    #[must_use]
    pub fn connections(&self, socket: &Path) -> usize {
        let mut before = String::new();
        let mut count = 0;
        for message in self.sent(socket) {
            count += usize::from(message == "GET_FEATURES" && !before.starts_with("SET_VRING_ENABLE"));
            before = message;
        }
        count
    }

    /// How often the first ring was enabled at the backend at `socket`: by a driver, and each time the
    /// backend was found again.
    #[must_use]
    pub fn starts(&self, socket: &Path) -> usize {
        let enabled = |message: &&String| message.starts_with("SET_VRING_ENABLE ring=0 num=1");
        self.sent(socket).iter().filter(enabled).count()
    }

    /// Waits until the first ring was enabled that often at the backend at `socket`.
    ///
    /// # Panics
    /// When it was not in time.
    pub fn expect_starts(&self, socket: &Path, count: usize) {
        let what = format!("start {count} of the queues at {}", socket.display());
        wait::until(&what, STEP, || (self.starts(socket) >= count).then_some(()));
    }

    /// How many sockets the program holds. A connection that is lost is closed.
    ///
    /// # Panics
    /// When the program has gone.
    #[must_use]
    pub fn sockets(&self) -> usize {
        let open = fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
        let names = open.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        names.filter(|name| name.to_string_lossy().starts_with("socket:")).count()
    }

    /// Waits until the program holds at least `fewer` sockets less than the `before` that [`Vm::sockets`]
    /// gave.
    ///
    /// # Panics
    /// When the program keeps them.
    pub fn expect_lost(&self, before: usize, fewer: usize) {
        wait::until("lost connections are closed", STEP, || (self.sockets() + fewer <= before).then_some(()));
    }

    /// The serial console, when it is on standard output.
    ///
    /// # Panics
    /// When it is elsewhere.
    #[must_use]
    pub fn console(&self) -> &Capture {
        self.console.as_ref().expect("the console is on standard output")
    }

    /// Types on the console.
    ///
    /// # Panics
    /// When standard input is closed.
    pub fn send(&mut self, bytes: &[u8]) {
        let stdin = self.stdin.as_mut().expect("standard input is a pipe, and open");
        stdin.write_all(bytes).and_then(|()| stdin.flush()).expect("outboard reads its standard input");
    }

    /// Closes standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// When it has gone.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Its threads and what they have used so far.
    ///
    /// # Panics
    /// When it has gone.
    #[must_use]
    pub fn threads(&self) -> Vec<Thread> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        // One that has just ended is not there any more.
        tasks.filter_map(|task| Thread::read(&task.ok()?.path())).collect()
    }

    /// True while it has not ended.
    ///
    /// # Panics
    /// When the host does not tell.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end, at most `patience(limit)`.
    ///
    /// # Panics
    /// When it does not end.
    #[must_use]
    pub fn end(mut self, limit: Duration) -> Ended {
        let child = &mut self.child;
        let status = wait::poll(limit, || child.try_wait().unwrap());
        let Some(status) = status else { panic!("outboard did not end within {:?}", wait::patience(limit)) };
        self.status = Some(status);
        let took = self.begun.elapsed();
        if let Some(console) = self.console.as_mut() {
            console.finish(STEP);
        }
        self.log.finish(STEP);
        Ended {
            code: status.code(),
            took,
            console: self.console.as_ref().map(Capture::text).unwrap_or_default(),
            log: self.log.text(),
            stats: Stats::read(&self.launch.scratch.path(STATS)),
            files: Rc::clone(&self.launch.scratch),
        }
    }

    fn evidence(&self) {
        let words: Vec<_> = self.launch.arguments.iter().map(|word| word.to_string_lossy()).collect();
        eprintln!("--- {} {}", self.launch.program.display(), words.join(" "));
        match self.status {
            Some(status) => eprintln!("--- ended: {status}"),
            None => eprintln!("--- not ended after {:?}", self.begun.elapsed()),
        }
        eprintln!("--- its standard error\n{}", tail(&self.log.text(), 60));
        if let Ok(trace) = fs::read_to_string(self.launch.scratch.path(TRACE)) {
            eprintln!("--- its last messages\n{}", tail(&trace, 12));
        }
        if let Some(console) = &self.console {
            eprintln!("--- the end of its console\n{}\n---", tail(&console.text(), 60));
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.evidence();
        }
        if self.status.is_none() {
            // One that has just ended is as good as killed.
            self.child.kill().unwrap_or_default();
            self.child.wait().map(|_| ()).unwrap_or_default();
        }
    }
}

/// One thread of the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Thread {
    /// Its name.
    pub name: String,
    /// How often it went to sleep by itself: as often as it was woken. That others took its processor is not
    /// counted.
    pub sleeps: u64,
    /// How long it has run.
    pub cpu: Duration,
}

impl Thread {
    fn read(task: &Path) -> Option<Self> {
        let read = |name: &str| fs::read_to_string(task.join(name)).ok();
        let times: Vec<u64> =
            read("schedstat")?.split_whitespace().map(|word| word.parse().unwrap()).collect();
        let status = read("status")?;
        let sleeps = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
        Some(Self {
            name: read("comm")?.trim_end().to_owned(),
            sleeps: sleeps.trim().parse().unwrap(),
            cpu: Duration::from_nanos(times[0]),
        })
    }
}

/// What remains of a run.
#[derive(Clone, Debug)]
pub struct Ended {
    /// The exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// From the start of the process to its end.
    pub took: Duration,
    /// Everything on standard output.
    pub console: String,
    /// Everything on standard error.
    pub log: String,
    stats: Option<Stats>,
    /// The folder with its files, as it left it.
    pub files: Rc<Scratch>,
}

impl Ended {
    /// The statistics.
    ///
    /// # Panics
    /// When there are none.
    #[must_use]
    pub fn stats(&self) -> &Stats {
        self.stats.as_ref().unwrap_or_else(|| panic!("no statistics\n{self}"))
    }

    /// Checks the exit code.
    ///
    /// # Panics
    /// When it is another.
    pub fn with_code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "exit code\n{self}");
        self
    }

    /// A number that the payload printed.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn field(&self, key: &str) -> u64 {
        payload::field(&self.console, key).unwrap_or_else(|| panic!("no {key}= on the console\n{self}"))
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "--- exit code {:?} after {:?}", self.code, self.took)?;
        writeln!(f, "--- standard error\n{}", tail(&self.log, 60))?;
        write!(f, "--- the end of the console\n{}\n---", tail(&self.console, 60))
    }
}

/// A command line for the tiny kernel that drives the machine's first virtio device.
///
/// # Panics
/// Never: every machine has room for one device.
#[must_use]
pub fn first_device(mode: &str) -> CommandLine {
    first_devices(mode, 1)
}

/// The same for the first `count` devices.
///
/// # Panics
/// When no machine has that many.
#[must_use]
pub fn first_devices(mode: &str, count: usize) -> CommandLine {
    (0..count).fold(CommandLine::new(mode), |line, n| {
        let place = virtio_mmio_slot(n).expect("a machine has room for that many devices");
        line.device(place.base.0, place.gsi.0)
    })
}
