//! The control loop: one thread waits for everything that is not a guest's exit.
//!
//! It lives for one boot and ends with the request that ended it. It never waits on a peer for longer than
//! that peer's deadline, and never on the console.

pub(crate) mod peers;
mod shared_objects;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use crate::board::Board;
use crate::console::{Console, Input, Readable};
use crate::devices::{DeviceList, MachineDevice, Notice};
use crate::error::Error;
use crate::life::gate::Request;
use crate::life::signals::{Asked, Signals};

/// What an event is about; a number is added to the last two.
mod token {
    pub(crate) const REQUEST: u32 = 0;
    pub(crate) const INPUT: u32 = 1;
    pub(crate) const INPUT_SPACE: u32 = 2;
    pub(crate) const CLIENT: u32 = 3;
    pub(crate) const EVENT_LINE: u32 = 5;
    pub(crate) const OUTPUT: u32 = 6;
    pub(crate) const QUIT: u32 = 7;
    pub(crate) const LOOK: u32 = 8;
    pub(crate) const PEER_MEMORY: u32 = 9;
    pub(crate) const SIGNAL: u32 = 0x100;
    /// The descriptors of all devices.
    pub(crate) const DEVICE: u32 = 0x1000;
}

/// The parts of a machine that the loop serves during one boot.
pub(crate) struct Control<'m> {
    /// The boot's hardware.
    board: &'m Board,
    /// The console, for its input.
    console: &'m mut Console,
    /// What is watched for devices: a token is a place in this list.
    notices: Vec<(Arc<dyn MachineDevice>, Notice)>,
    signals: &'m Signals,
    /// Readable when a handle asks for the end.
    asked: &'m UnixStream,
    client: Option<UnixStream>,
    /// Says when to look again whether this process is in the foreground of its terminal.
    look: Option<OwnedFd>,
    input: Watch,
    ended: bool,
}

/// How the source of console input is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watch {
    /// epoll tells when there is input.
    Watched,
    /// The guest has not taken what it was given; watched again when it has.
    Paused,
    /// A plain file or /dev/null: epoll refuses it, and reading never waits.
    Ready,
    /// Nothing more will come.
    Ended,
}

impl<'m> Control<'m> {
    /// Serves `board` until somebody requests its end.
    ///
    /// # Errors
    /// When the host's epoll fails.
    pub(crate) fn run(
        board: &'m Board,
        console: &'m mut Console,
        devices: &DeviceList,
        signals: &'m Signals,
        asked: &'m UnixStream,
    ) -> Result<Request, Error> {
        let cannot = |error: event_manager::Error| Error::internal("cannot wait for events").because(error);
        let notices = devices.iter().flat_map(|device| {
            let notices = device.watched().into_iter().map(|(_, notice)| (Arc::clone(device), notice));
            notices.collect::<Vec<_>>()
        });
        let notices = notices.collect();
        let control = Control {
            board,
            console,
            notices,
            signals,
            asked,
            client: None,
            look: None,
            input: Watch::Ended,
            ended: false,
        };
        let mut events = EventManager::new().map_err(cannot)?;
        let id = events.add_subscriber(control);
        loop {
            let control = events.subscriber_mut(id).map_err(cannot)?;
            // Asked again: what came after the wake-up may count for more.
            if control.ended
                && let Some(request) = board.lifecycle().take_request()
            {
                return Ok(request);
            }
            match events.run() {
                Ok(_) => {}
                Err(event_manager::Error::Epoll(error)) if error.errno() == INTERRUPTED => {}
                Err(error) => return Err(cannot(error)),
            }
        }
    }

    /// Takes the terminal, if there is one. In its background, looks again every now and then: no shell says when that
    /// ends.
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
                watch(ops, Events::with_data(&look, token::LOOK, EventSet::IN));
                self.look = Some(look);
            }
            Err(error) => log::warn!("the keys of the terminal are not read any more: {error}"),
        }
    }

    /// Input for the guest; stops watching the source when it has ended or the guest is full.
    fn receive(&mut self, ops: &mut EventOps<'_>) {
        if !self.console.begin() {
            return self.begin_input(ops);
        }
        let serial = self.board.serial();
        let input = self.console.receive(|bytes| serial.enqueue(bytes));
        let full = !self.console.flush(|bytes| serial.enqueue(bytes));
        match input {
            Input::Quit => self.board.lifecycle().request(Request::Quit),
            Input::Ended => self.watch_input(ops, Watch::Ended),
            Input::Open if full && self.input == Watch::Watched => self.watch_input(ops, Watch::Paused),
            Input::Open => {}
        }
    }

    /// The guest has read: offer what waits, and go on reading the source.
    fn input_space(&mut self, ops: &mut EventOps<'_>) {
        let serial = self.board.serial();
        serial.clear_input_space();
        let mut empty = self.console.flush(|bytes| serial.enqueue(bytes));
        while empty && self.input == Watch::Ready {
            self.receive(ops);
            empty = self.console.flush(|bytes| serial.enqueue(bytes));
        }
        if empty && self.input == Watch::Paused && self.look.is_none() {
            self.watch_input(ops, Watch::Watched);
        }
    }

    /// Starts or stops watching the source.
    fn watch_input(&mut self, ops: &mut EventOps<'_>, wanted: Watch) {
        let event = match (self.console.readable(), &self.client) {
            (Readable::Bytes(fd), _) => Events::with_data(&fd, token::INPUT, EventSet::IN),
            (Readable::Clients(_), Some(client)) => Events::with_data(client, token::CLIENT, EventSet::IN),
            _ => return,
        };
        if wanted == Watch::Watched {
            match ops.add(event) {
                Ok(()) => self.input = Watch::Watched,
                Err(error) => {
                    log::debug!("console input cannot be waited for, and need not ({error})");
                    self.input = Watch::Ready;
                }
            }
            return;
        }
        if self.input == Watch::Watched {
            unwatch(ops, event);
        }
        self.input = wanted;
        if wanted == Watch::Ended && self.client.take().is_some() {
            self.watch_output(ops, Watch::Ended);
            self.console.client_gone();
            self.watch_clients(ops);
        }
    }

    /// Has epoll say when the reader of the console takes more: at each change, as there is mostly nothing to pass on.
    fn watch_output(&self, ops: &mut EventOps<'_>, wanted: Watch) {
        self.console.output().with_outlet(|outlet| {
            let Some(fd) = outlet.fd() else { return };
            let event = Events::with_data(&fd, token::OUTPUT, EventSet::OUT | EventSet::EDGE_TRIGGERED);
            let changed = if wanted == Watch::Watched { ops.add(event) } else { ops.remove(event) };
            if let Err(error) = changed {
                log::debug!("console output cannot be waited for, and need not ({error})");
            }
        });
    }

    /// Serves the console socket's client, or waits for one. While there is one the next waits in the socket's
    /// queue: refused, it would lose the race against the news that the first has gone.
    fn watch_clients(&mut self, ops: &mut EventOps<'_>) {
        self.client = self.console.client();
        if self.client.is_some() {
            self.watch_output(ops, Watch::Watched);
            self.watch_input(ops, Watch::Watched);
        } else if let Readable::Clients(fd) = self.console.readable() {
            watch(ops, Events::with_data(&fd, token::INPUT, EventSet::IN));
        }
    }

    fn accept(&mut self, event: Events, ops: &mut EventOps<'_>) {
        if self.console.accept() {
            unwatch(ops, event);
            self.watch_clients(ops);
        }
    }

    fn signal(&mut self, index: u32, ops: &mut EventOps<'_>) {
        match self.signals.take(usize::try_from(index).unwrap_or(usize::MAX)) {
            Some(Asked::End(signal)) => self.board.lifecycle().request(Request::Signal(signal)),
            Some(Asked::Continued) => self.begin_input(ops),
            None => {}
        }
    }
}

impl MutEventSubscriber for Control<'_> {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, Events::with_data(self.board.lifecycle().wake(), token::REQUEST, EventSet::IN));
        watch(ops, Events::with_data(&self.board.serial().input_space(), token::INPUT_SPACE, EventSet::IN));
        let memory = self.board.peer_memory();
        watch(ops, Events::with_data(&memory.timer(), token::PEER_MEMORY, EventSet::IN));
        if let Some(hotplug) = self.board.hotplug() {
            watch(ops, Events::with_data(&hotplug.line().lowered(), token::EVENT_LINE, EventSet::IN));
        }
        watch(ops, Events::with_data(self.asked, token::QUIT, EventSet::IN));
        for (index, stream) in (0..).zip(self.signals.sockets()) {
            watch(ops, Events::with_data(stream, token::SIGNAL + index, EventSet::IN));
        }
        let mut token = token::DEVICE;
        for (device, notice) in &self.notices {
            let watched = device.watched();
            if let Some((fd, _)) = watched.iter().find(|(_, watched)| watched == notice) {
                watch(ops, Events::with_data(fd, token, EventSet::IN));
            }
            token = token.saturating_add(1);
        }
        match self.console.readable() {
            Readable::Nothing => {}
            Readable::Clients(_) => self.watch_clients(ops),
            Readable::Bytes(_) => {
                self.watch_input(ops, Watch::Watched);
                self.begin_input(ops);
            }
        }
        if self.client.is_none() {
            self.watch_output(ops, Watch::Watched);
        }
        // Bytes may wait from before a reboot, and a plain file has its bytes ready.
        self.input_space(ops);
    }

    fn process(&mut self, event: Events, ops: &mut EventOps<'_>) {
        match event.data() {
            token::REQUEST => self.ended = true,
            token::INPUT if matches!(self.console.readable(), Readable::Clients(_)) => {
                self.accept(event, ops);
            }
            token::INPUT | token::CLIENT => self.receive(ops),
            token::INPUT_SPACE => self.input_space(ops),
            token::OUTPUT => {
                if self.console.output().pass_on() {
                    self.board.serial().output_space();
                }
            }
            token::LOOK => {
                unwatch(ops, event);
                self.begin_input(ops);
            }
            token::QUIT => {
                // Asked once or often: it counts once, and a handle that is gone asks for nothing.
                unwatch(ops, event);
                self.board.lifecycle().request(Request::Quit);
            }
            token::EVENT_LINE => {
                if let Some(hotplug) = self.board.hotplug() {
                    hotplug.line_lowered();
                }
            }
            token::PEER_MEMORY => self.board.peer_memory().look(),
            signal if (token::SIGNAL..token::DEVICE).contains(&signal) => {
                self.signal(signal - token::SIGNAL, ops);
            }
            other => {
                let place = usize::try_from(other.saturating_sub(token::DEVICE)).ok();
                if let Some((device, notice)) = place.and_then(|place| self.notices.get(place)) {
                    device.notice(*notice);
                }
            }
        }
    }
}

const INTERRUPTED: i32 = 4;

/// How long to wait before looking again whether this process is in the foreground of its terminal.
const LOOK: Duration = Duration::from_millis(300);

/// Becomes readable once, after `pause`.
fn timer(pause: Duration) -> std::io::Result<OwnedFd> {
    let fd = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
    let it_value = Timespec::try_from(pause).map_err(std::io::Error::other)?;
    let when = Itimerspec { it_interval: Timespec::default(), it_value };
    timerfd_settime(&fd, TimerfdTimerFlags::empty(), &when)?;
    Ok(fd)
}

fn watch(ops: &mut EventOps<'_>, event: Events) -> bool {
    match ops.add(event) {
        Ok(()) => true,
        Err(error) => {
            log::error!("cannot watch descriptor {}: {error}", event.fd());
            false
        }
    }
}

fn unwatch(ops: &mut EventOps<'_>, event: Events) {
    if let Err(error) = ops.remove(event) {
        log::debug!("descriptor {} was not watched: {error}", event.fd());
    }
}
