//! The control loop: one thread that waits for every event except the guest's exits.
//!
//! The loop lives as long as the machine, over reboots. It must never wait for a peer, for a standard stream,
//! or for a lock that another thread holds during an exchange with a peer.
//!
//! During a reboot or at the end, the machine has to wait until vCPUs have left the guest and devices are
//! unplugged. It waits in short turns of this loop, so that signals, input and commands are still served.

pub(crate) mod ledger;

use std::cell::RefCell;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::pci::{Hotplug, IntxLines};
use devices::serial::Serial;
use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use crate::console::{Console, Input, Readable};
use crate::control::ledger::Ledger;
use crate::devices::{DeviceList, Notice};
use crate::error::Error;
use crate::handle::{Command, Mailbox};
use crate::host::peer_memory::PeerMemory;
use crate::life::gate::{Lifecycle, Request};
use crate::life::signals::{Asked, Signals};

/// The source of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// A request was made that ends the boot.
    Request,
    /// The guest has read from its serial port, which has room for input.
    InputSpace,
    /// The guest has served the interrupt that announces hot-plug events.
    EventLine,
    /// A PCI function signals its interrupt line, or the guest has served the interrupt of a line.
    Lines,
    /// A timer: it is time to check the peers' files that are mapped into the guest.
    PeerMemory,
    /// Standard input has bytes for the guest.
    Input,
    /// A client connects to the console socket.
    Clients,
    /// The client of the console socket has sent bytes for the guest.
    Client,
    /// The reader of the console takes bytes again.
    Output,
    /// A timer: it is time to check again whether this process is in the foreground of its terminal.
    Look,
    /// A `Handle` has sent a command.
    Command,
    /// A signal arrived. The number is its place among the watched signals.
    Signal(usize),
    /// A descriptor of the device at this place in the list is readable.
    Device(usize, Notice),
}

/// The parts of a board that the loop serves.
pub(crate) struct Served {
    pub(crate) lifecycle: Arc<Lifecycle>,
    pub(crate) serial: Arc<Serial>,
    pub(crate) hotplug: Option<Arc<Hotplug>>,
    pub(crate) peer_memory: Arc<PeerMemory>,
    pub(crate) lines: Option<Arc<IntxLines>>,
}

/// The state of the control loop and everything that it serves.
pub(crate) struct Control {
    /// The present board. `None` while the machine reboots or ends.
    board: Option<Served>,
    console: Console,
    devices: DeviceList,
    signals: Signals,
    mailbox: Mailbox,
    ledger: Ledger,
    /// The sources of events. The data of an epoll event is an index into this list.
    sources: Vec<Source>,
    client: Option<UnixStream>,
    /// The timer for the next check whether this process is in the foreground of its terminal.
    look: Option<OwnedFd>,
    input: Watch,
    /// The user, a handle or a signal has asked for the end of the machine: the request and its time.
    ending: Option<(Request, Instant)>,
}

/// How the source of console input is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watch {
    /// epoll reports input.
    Watched,
    /// The guest has not yet taken the earlier input. The source is watched again when the guest has taken
    /// it.
    Paused,
    /// The source is a plain file or /dev/null. epoll refuses such a descriptor, and a read of it never
    /// waits.
    Ready,
    /// The source has ended.
    Ended,
}

/// The loop itself.
pub(crate) struct Loop {
    events: EventManager<Rc<RefCell<Control>>>,
    id: SubscriberId,
    control: Rc<RefCell<Control>>,
    cut: bool,
}

fn cannot(error: event_manager::Error) -> Error {
    Error::internal("cannot wait for events").because(error)
}

impl Loop {
    /// Begins to watch everything except a board.
    ///
    /// # Errors
    /// When the host's epoll fails.
    pub(crate) fn new(
        console: Console,
        devices: DeviceList,
        signals: Signals,
        mailbox: Mailbox,
        ledger: Ledger,
    ) -> Result<Self, Error> {
        let control = Rc::new(RefCell::new(Control {
            board: None,
            console,
            devices,
            signals,
            mailbox,
            ledger,
            sources: Vec::new(),
            client: None,
            look: None,
            input: Watch::Ended,
            ending: None,
        }));
        let mut events = EventManager::new().map_err(cannot)?;
        let id = events.add_subscriber(Rc::clone(&control));
        Ok(Self { events, id, control, cut: false })
    }

    fn with<T>(&mut self, act: impl FnOnce(&mut Control, &mut EventOps<'_>) -> T) -> Result<T, Error> {
        let mut ops = self.events.event_ops(self.id).map_err(cannot)?;
        Ok(act(&mut self.control.borrow_mut(), &mut ops))
    }

    /// Calls `act` with the ledger, which holds the statistics.
    pub(crate) fn ledger<T>(&self, act: impl FnOnce(&mut Ledger) -> T) -> T {
        act(&mut self.control.borrow_mut().ledger)
    }

    /// Serves `board` from now on; with `None`, serves no board.
    ///
    /// # Errors
    /// When the host's epoll fails.
    pub(crate) fn serve(&mut self, board: Option<Served>) -> Result<(), Error> {
        self.with(|control, ops| control.change_board(board, ops))
    }

    /// The request of the user, a handle or a signal to end the machine, if there was one.
    pub(crate) fn ending(&self) -> Option<Request> {
        self.control.borrow().ending.as_ref().map(|(request, _)| request.clone())
    }

    /// Waits for events and serves them. Waits at most for `limit`.
    ///
    /// # Errors
    /// When the host's epoll fails.
    pub(crate) fn turn(&mut self, limit: Option<Duration>) -> Result<(), Error> {
        let limit = limit.map_or(-1, |limit| i32::try_from(limit.as_millis()).unwrap_or(i32::MAX));
        match self.events.run_with_timeout(limit) {
            Ok(_) => Ok(()),
            Err(event_manager::Error::Epoll(error)) if error.errno() == INTERRUPTED => Ok(()),
            Err(error) => Err(cannot(error)),
        }
    }

    /// One short turn, called while the machine waits for vCPUs or devices.
    ///
    /// When the end of the machine was requested, vCPUs and devices get `GRACE` to end in order. After that
    /// time the connections to all peers are cut, because a peer may hang.
    pub(crate) fn turn_and_hurry(&mut self) {
        if let Err(error) = self.turn(Some(TICK)) {
            log::error!("{error}");
            std::thread::sleep(TICK);
        }
        let control = self.control.borrow();
        let late = control.ending.as_ref().is_some_and(|(_, since)| since.elapsed() > GRACE);
        if late && !std::mem::replace(&mut self.cut, true) {
            control.mailbox.listeners.end();
            control.ledger.settle();
            control.devices.iter().for_each(|device| device.cut());
        }
    }

    /// Ends the loop. The reader of the console gets the bytes that still wait, as long as it goes on
    /// reading.
    pub(crate) fn finish(&mut self) -> Result<(), Error> {
        let output = Arc::clone(self.control.borrow().console.output());
        let (mut rest, mut since) = (output.waiting(), Instant::now());
        while rest > 0 && since.elapsed() < SILENCE && self.ending().is_none() {
            self.turn(Some(TICK))?;
            let waiting = output.waiting();
            if waiting < rest {
                (rest, since) = (waiting, Instant::now());
            }
        }
        output.finish();
        Ok(())
    }
}

/// The length of one turn while the machine waits for vCPUs, devices or the console's reader.
const TICK: Duration = Duration::from_millis(2);

/// The time that vCPUs and devices get to end in order after the end of the machine was requested.
const GRACE: Duration = Duration::from_millis(100);

/// The longest pause of the console's reader at the end. After it, the bytes that the reader has not taken
/// are lost.
const SILENCE: Duration = Duration::from_secs(1);

impl Control {
    /// Adds `fd` to epoll. Fails for a descriptor that epoll cannot watch.
    fn watch(
        &mut self,
        ops: &mut EventOps<'_>,
        fd: &impl AsRawFd,
        source: Source,
        set: EventSet,
    ) -> Result<(), event_manager::Error> {
        let place = self.sources.iter().position(|known| *known == source).unwrap_or_else(|| {
            self.sources.push(source);
            self.sources.len() - 1
        });
        ops.add(Events::with_data(fd, u32::try_from(place).unwrap_or(u32::MAX), set))
    }

    /// Adds a descriptor that epoll can always watch; a failure is only logged.
    fn listen(&mut self, ops: &mut EventOps<'_>, fd: &impl AsRawFd, source: Source) {
        if let Err(error) = self.watch(ops, fd, source, EventSet::IN) {
            log::error!("cannot watch {source:?}: {error}");
        }
    }

    fn change_board(&mut self, board: Option<Served>, ops: &mut EventOps<'_>) {
        if let Some(old) = self.board.take() {
            unwatch(ops, old.lifecycle.wake());
            unwatch(ops, &old.serial.input_space());
            unwatch(ops, &old.peer_memory.timer());
            old.lines.iter().for_each(|lines| unwatch(ops, &lines.as_fd()));
            old.hotplug.iter().for_each(|hotplug| unwatch(ops, &hotplug.line().lowered()));
        }
        let Some(board) = board else { return };
        self.listen(ops, board.lifecycle.wake(), Source::Request);
        self.listen(ops, &board.serial.input_space(), Source::InputSpace);
        self.listen(ops, &board.peer_memory.timer(), Source::PeerMemory);
        if let Some(lines) = &board.lines {
            self.listen(ops, &lines.as_fd(), Source::Lines);
        }
        if let Some(hotplug) = &board.hotplug {
            self.listen(ops, &hotplug.line().lowered(), Source::EventLine);
        }
        if let Some((request, _)) = &self.ending {
            board.lifecycle.request(request.clone());
        }
        self.board = Some(board);
        // Bytes may be waiting from before a reboot. If the source is a plain file, its bytes are ready as
        // well.
        self.input_space(ops);
    }

    /// Asks for the end of the machine.
    fn end(&mut self, request: Request) {
        if let Some(board) = &self.board {
            board.lifecycle.request(request.clone());
        }
        self.ending.get_or_insert((request, Instant::now()));
    }

    /// Makes the terminal raw, if the source is a terminal. If this process is in the background, a timer
    /// repeats the attempt: no signal says when the process comes to the foreground.
    fn begin_input(&mut self, ops: &mut EventOps<'_>) {
        if self.console.begin() {
            self.look = None;
            if self.input == Watch::Paused {
                self.input_space(ops);
            }
            return;
        }
        self.watch_input(ops, Watch::Paused);
        match timer(LOOK) {
            Ok(look) => {
                self.listen(ops, &look, Source::Look);
                self.look = Some(look);
            }
            Err(error) => log::warn!("the keys of the terminal are not read any more: {error}"),
        }
    }

    /// Offers the guest the bytes that wait for it. True when no bytes wait any more.
    fn flush(&mut self) -> bool {
        let serial = self.board.as_ref().map(|board| &board.serial);
        self.console.flush(|bytes| serial.map_or(0, |serial| serial.enqueue(bytes)))
    }

    /// Reads input for the guest. Stops watching the source when the source has ended or the guest takes no
    /// more.
    fn receive(&mut self, ops: &mut EventOps<'_>) {
        if !self.console.begin() {
            return self.begin_input(ops);
        }
        let input = self.console.receive();
        let full = !self.flush();
        match input {
            Input::Quit => self.end(Request::Quit),
            Input::Ended => self.watch_input(ops, Watch::Ended),
            Input::Open if full && self.input == Watch::Watched => self.watch_input(ops, Watch::Paused),
            Input::Open => {}
        }
    }

    /// The guest has read from its serial port: offers it the bytes that wait, then reads on from the source.
    fn input_space(&mut self, ops: &mut EventOps<'_>) {
        if let Some(board) = &self.board {
            board.serial.clear_input_space();
        }
        let mut empty = self.flush();
        while empty && self.input == Watch::Ready {
            self.receive(ops);
            empty = self.flush();
        }
        if empty && self.input == Watch::Paused && self.look.is_none() {
            self.watch_input(ops, Watch::Watched);
        }
    }

    /// Starts or stops watching the source of input.
    fn watch_input(&mut self, ops: &mut EventOps<'_>, wanted: Watch) {
        let (fd, source) = match (self.console.readable(), &self.client) {
            (Readable::Bytes(fd), _) => (fd.as_raw_fd(), Source::Input),
            (Readable::Clients(_), Some(client)) => (client.as_raw_fd(), Source::Client),
            _ => return,
        };
        if wanted == Watch::Watched {
            self.input = match self.watch(ops, &fd, source, EventSet::IN) {
                Ok(()) => Watch::Watched,
                Err(error) => {
                    log::debug!("console input cannot be waited for, and need not ({error})");
                    Watch::Ready
                }
            };
            return;
        }
        if self.input == Watch::Watched {
            unwatch(ops, &fd);
        }
        self.input = wanted;
        if wanted == Watch::Ended && self.client.take().is_some() {
            self.console.output().with_fd(|fd| unwatch(ops, &fd));
            self.console.client_gone();
            self.watch_clients(ops);
        }
    }

    /// Watches the console's output descriptor, edge-triggered: there are mostly no bytes to pass on, so a
    /// level-triggered watch would report the descriptor all the time.
    fn watch_output(&mut self, ops: &mut EventOps<'_>) {
        let Some(fd) = self.console.output().with_fd(|fd| fd.as_raw_fd()) else { return };
        let set = EventSet::OUT | EventSet::EDGE_TRIGGERED;
        if let Err(error) = self.watch(ops, &fd, Source::Output, set) {
            log::debug!("console output cannot be waited for, and need not ({error})");
        }
    }

    /// Serves the client of the console socket, or waits for a client. While there is a client, the next
    /// client waits in the socket's queue. It is not refused, because it may connect before the loop has
    /// noticed that the first client is gone.
    fn watch_clients(&mut self, ops: &mut EventOps<'_>) {
        self.client = self.console.client();
        if self.client.is_some() {
            self.watch_output(ops);
            self.watch_input(ops, Watch::Watched);
        } else if let Readable::Clients(fd) = self.console.readable() {
            let fd = fd.as_raw_fd();
            self.listen(ops, &fd, Source::Clients);
        }
    }

    fn signal(&mut self, index: usize, ops: &mut EventOps<'_>) {
        match self.signals.take(index) {
            Some(Asked::End(signal)) => self.end(Request::Signal(signal)),
            Some(Asked::Continued) => self.begin_input(ops),
            None => {}
        }
    }

    fn command(&mut self) {
        for command in self.mailbox.take() {
            match command {
                Command::Quit => self.end(Request::Quit),
                Command::Stats(reply) => {
                    if reply.send(self.ledger.read()).is_err() {
                        log::debug!("nobody waits for the statistics any more");
                    }
                }
            }
        }
    }
}

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let mailbox = self.mailbox.wake().as_raw_fd();
        self.listen(ops, &mailbox, Source::Command);
        let signals: Vec<_> = self.signals.sockets().map(AsRawFd::as_raw_fd).collect();
        for (index, fd) in signals.into_iter().enumerate() {
            self.listen(ops, &fd, Source::Signal(index));
        }
        for (index, device) in self.devices.clone().iter().enumerate() {
            for (fd, notice) in device.watched() {
                self.listen(ops, &fd, Source::Device(index, notice));
            }
        }
        match self.console.readable() {
            Readable::Nothing => self.watch_output(ops),
            Readable::Clients(_) => self.watch_clients(ops),
            Readable::Bytes(_) => {
                self.watch_output(ops);
                self.watch_input(ops, Watch::Watched);
                self.begin_input(ops);
            }
        }
    }

    fn process(&mut self, event: Events, ops: &mut EventOps<'_>) {
        let source = usize::try_from(event.data()).ok().and_then(|place| self.sources.get(place).copied());
        match source {
            // The machine's main loop asks the lifecycle for the request.
            Some(Source::Request) | None => {}
            Some(Source::InputSpace) => self.input_space(ops),
            Some(Source::EventLine) => {
                if let Some(hotplug) = self.board.as_ref().and_then(|board| board.hotplug.as_ref()) {
                    hotplug.line_lowered();
                }
            }
            Some(Source::Lines) => {
                if let Some(lines) = self.board.as_ref().and_then(|board| board.lines.as_ref()) {
                    lines.serve();
                }
            }
            Some(Source::PeerMemory) => {
                if let Some(board) = &self.board {
                    board.peer_memory.look();
                }
            }
            Some(Source::Input | Source::Client) => self.receive(ops),
            Some(Source::Clients) => {
                if self.console.accept() {
                    unwatch(ops, &event.fd());
                    self.watch_clients(ops);
                }
            }
            Some(Source::Output) => {
                if self.console.output().pass_on()
                    && let Some(board) = &self.board
                {
                    board.serial.output_space();
                }
            }
            Some(Source::Look) => {
                unwatch(ops, &event.fd());
                self.begin_input(ops);
            }
            Some(Source::Command) => self.command(),
            Some(Source::Signal(index)) => self.signal(index, ops),
            Some(Source::Device(index, notice)) => {
                if let Some(device) = self.devices.iter().nth(index) {
                    device.notice(notice);
                }
            }
        }
    }
}

const INTERRUPTED: i32 = 4;

/// The pause between two checks whether this process is in the foreground of its terminal.
const LOOK: Duration = Duration::from_millis(300);

/// A timer that becomes readable once, after `pause`.
fn timer(pause: Duration) -> std::io::Result<OwnedFd> {
    let fd = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
    let it_value = Timespec::try_from(pause).map_err(std::io::Error::other)?;
    let when = Itimerspec { it_interval: Timespec::default(), it_value };
    timerfd_settime(&fd, TimerfdTimerFlags::empty(), &when)?;
    Ok(fd)
}

fn unwatch(ops: &mut EventOps<'_>, fd: &impl AsRawFd) {
    if let Err(error) = ops.remove(Events::empty(fd)) {
        log::debug!("descriptor {} was not watched: {error}", fd.as_raw_fd());
    }
}
