//! Whole conversations with a vhost-user backend that says what it likes: negotiation, rings, every request
//! there is, stops and starts. Nothing is left open, whatever the end.
#![no_main]

use std::net::Shutdown;
use std::os::fd::AsFd;
use std::sync::Arc;

use fuzz::descriptors::{guest_memory, memory_file, none_left};
use fuzz::handler::Handler;
use fuzz::peer::Peer;
use fuzz::seeds::{offer, spaced};
use libfuzzer_sys::fuzz_target;
use transport::memory::DirtyLog;
use transport::memory::log_size;
use transport::memory::{GuestAddr, Iova, MemoryMap, SharedRegion};
use transport::peer::Error;
use transport::vhost_user::extras::{SessionId, SymmetricSession};
use transport::vhost_user::iotlb::{Access, IovaRange};
use transport::vhost_user::message::Uuid;
use transport::vhost_user::{
    BackendChannel, Call, IovaMap, Kick, LiveSession, Lost, ProtocolFeatures, Ring, RingBase, RingError,
    RingSwitch, Session, Wanted,
};

/// Operations of one conversation; each is a few messages.
const STEPS: usize = 24;

fuzz_target!(init: offer(&seeds()), |data: &[u8]| {
    none_left(|| converse(data));
});

/// Each operation on its own, standing and live.
fn seeds() -> Vec<Vec<u8>> {
    let before = |op: u8| [vec![0; 16], spaced(&[op, 1, 1])].concat();
    let after = |op: u8| [vec![0; 16], spaced(&[1, op, 1])].concat();
    (1..16).map(before).chain((1..16).map(after)).collect()
}

/// Where a conversation is.
enum Stage {
    Standing(Session),
    Live(LiveSession),
    Over,
}

struct Front {
    peer: Peer,
    memory: MemoryMap,
    channel: Option<BackendChannel>,
    handler: Handler,
    eventfds: (Kick, Call, RingError),
}

fn converse(data: &[u8]) {
    let (peer, connection) = Peer::new(fuzz::input::Input::new(data));
    let wanted = match peer.draw(|input| input.byte()) {
        0..200 => Wanted::default().and(ProtocolFeatures::from_bits((1 << 24) - 1)),
        _ => Wanted::default().and_not(ProtocolFeatures::from_bits(peer.draw(|input| input.u64()))),
    };
    // What only a machine with an IOMMU would take; half of the conversations do.
    let wanted = match peer.draw(|input| input.byte()) {
        0..128 => wanted,
        _ => wanted.adjust("+access_platform").expect("a name"),
    };
    let mut session = match connection.negotiate(&wanted) {
        Ok(session) => session,
        Err(error) => return print(&error),
    };
    let channel = session.take_backend_channel();
    let eventfd = "an eventfd";
    let eventfds =
        (Kick::new().expect(eventfd), Call::new().expect(eventfd), RingError::new().expect(eventfd));
    let mut front = Front { peer, memory: guest_memory(), channel, handler: Handler::default(), eventfds };
    let mut stage = Stage::Standing(session);
    let mut steps = 0;
    while steps < STEPS && !front.peer.draw(|input| input.is_empty()) {
        let op = front.peer.draw(|input| input.byte());
        if op == 0 {
            continue;
        }
        steps += 1;
        front.serve(op);
        stage = match stage {
            Stage::Standing(session) => front.standing(op, session),
            Stage::Live(live) => front.live(op, live),
            Stage::Over => break,
        };
    }
}

/// Every error can be told.
fn print(error: &Error) {
    assert!(error.to_string().contains("fuzz"), "{error}");
    let _ = (error.hint(), error.is_fatal(), error.is_absent(), std::error::Error::source(error));
}

fn told<T>(result: Result<T, Error>) {
    if let Err(error) = result {
        print(&error);
    }
}

/// What is left after a step that consumes the session.
fn lost(lost: Lost) -> Stage {
    let (error, session) = lost.into_parts();
    print(&error);
    session.map_or(Stage::Over, Stage::Standing)
}

impl Front {
    fn draw<T>(&self, draw: impl FnOnce(&mut fuzz::input::Input) -> T) -> T {
        self.peer.draw(draw)
    }

    /// What the backend asks on its own channel, from time to time.
    fn serve(&mut self, op: u8) {
        if op & 0x80 != 0 {
            self.peer.request();
        }
        if let Some(channel) = &mut self.channel {
            match channel.serve(&self.handler) {
                Ok(_) => {}
                Err(error) => {
                    print(&error);
                    self.channel = None;
                }
            }
        }
    }

    fn standing(&mut self, op: u8, mut session: Session) -> Stage {
        match op % 16 {
            1..=4 => return self.go_live(session),
            5 => told(self.read_config(&mut session)),
            6 => {
                let (at, bytes) = self.draw(|input| (input.number() as u32, input.bytes(300)));
                told(session.write_config(at, &bytes));
                told(session.restore_config(&bytes));
            }
            7 => told(session.status()),
            8 => told(session.reset_device()),
            9 => told(session.shmem_config().inspect(|sizes| assert!(sizes.len() <= 256))),
            10 => told(session.set_mtu(1500)),
            11 => {
                let most = self.draw(|input| input.number());
                let mut state = Vec::new();
                match session.save_state(&mut state, most) {
                    Ok(moved) => assert!(moved == state.len() as u64 && moved <= most),
                    Err(error) => print(&error),
                }
            }
            12 => told(session.load_state(&mut [7; 5000].as_slice())),
            13 => self.postcopy(&mut session),
            14 => {
                let log = DirtyLog::new(memory_file(4096), log_size(&self.memory), 0);
                return Stage::Standing(session.with_log(Arc::new(log)));
            }
            15 => {
                let range = |n: u64, guest: u64| IovaRange {
                    iova: Iova(n << 32),
                    size: 1 << 20,
                    guest: GuestAddr(guest),
                    access: Access::ReadWrite,
                };
                let map =
                    IovaMap::new(vec![range(0, 0), range(9, 1 << 20)], &self.memory).expect("a good map");
                return Stage::Standing(session.with_iova_map(Arc::new(map)));
            }
            _ => self.judge(&mut session),
        }
        Stage::Standing(session)
    }

    fn read_config(&self, session: &mut Session) -> Result<(), Error> {
        let size = self.draw(|input| usize::from(input.byte()));
        let config = session.read_config(size)?;
        assert!((1..=size).contains(&config.len()));
        Ok(())
    }

    /// Would this backend do in the place of another?
    fn judge(&self, session: &mut Session) {
        let offered = session.offered();
        let _ = (offered.to_string(), session.protocol().to_string(), session.offered_raw(), session.stats());
        assert!(!offered.has(30) && !offered.has(26));
        assert!(offered.accept(offered.bits() & self.draw(|input| input.u64())).is_ok());
    }

    fn postcopy(&self, session: &mut Session) {
        let advised = match session.postcopy_advise() {
            Ok(advised) => advised,
            Err(error) => return print(&error),
        };
        told(session.postcopy_listen(&advised));
        told(session.postcopy_memory(&advised, &self.memory).inspect(|bases| assert_eq!(bases.len(), 2)));
        told(session.postcopy_end(advised));
    }

    fn go_live(&self, session: Session) -> Stage {
        let offered = session.offered();
        let taken = match self.draw(|input| input.byte()) {
            0..64 => offered.bits() & !(1 << 34 | 1 << 33),
            64..128 => offered.bits() & !(1 << 33),
            128..192 => offered.bits(),
            _ => offered.bits() & self.draw(|input| input.u64()),
        };
        let features = offered.accept(taken).expect("a part of the offer");
        let (kick, call, error) = &self.eventfds;
        let mut rings = Vec::new();
        for index in 0..self.draw(|input| input.byte() % 4) + 1 {
            let odd = self.draw(|input| input.byte());
            let any =
                |at: u64| if odd & 0x20 == 0 { GuestAddr(at) } else { GuestAddr(self.draw(|i| i.number())) };
            let base = u64::from(index) << 16;
            rings.push(Ring {
                index: if odd & 0x40 == 0 { index.into() } else { self.draw(|input| input.u16()) },
                size: if odd & 0x80 == 0 { 256 } else { self.draw(|input| input.u16()) },
                descriptor: any(base + 0x1000),
                available: any(base + 0x3000),
                used: any(base + 0x4000),
                base: RingBase(0),
                kick,
                call,
                error: (odd & 1 != 0).then_some(error),
            });
        }
        match session.go_live(features, &self.memory, &rings) {
            Ok(live) => Stage::Live(live),
            Err(error) => lost(error),
        }
    }

    fn live(&mut self, op: u8, mut live: LiveSession) -> Stage {
        let stopped = |result: Result<(Session, Vec<RingBase>), Lost>| match result {
            Ok((session, _)) => Stage::Standing(session),
            Err(error) => lost(error),
        };
        match op % 16 {
            1 => return stopped(live.stop()),
            2 => return stopped(live.reset().map(|session| (session, Vec::new()))),
            3 => return stopped(live.suspend()),
            4 => {
                let (index, on) = self.draw(|input| (input.u16(), input.rarely(2)));
                let switch = if on { RingSwitch::Enabled } else { RingSwitch::Disabled };
                told(live.switch_rings(&[index], switch));
                told(live.kick_in_band(index));
            }
            5 => {
                let config = live.read_config(60);
                told(config.inspect(|config| assert!((1..=60).contains(&config.len()))));
                told(live.write_config(0, &[1, 2, 3, 4]));
                told(live.change_config(0, &[1, 2, 3, 4], 60));
            }
            6 => {
                let region =
                    SharedRegion::new(GuestAddr(8 << 30), 2 << 20, Arc::new(memory_file(2 << 20)), 0);
                told(live.add_region(&region));
                told(live.remove_region(&region));
            }
            7 => told(live.send_rarp([1, 2, 3, 4, 5, 6])),
            8 => {
                told(live.iotlb_invalidate(Iova(0), 1 << 20));
            }
            9 => {
                let session = SymmetricSession { cipher_key: vec![1; 16], ..SymmetricSession::default() };
                told(live.create_crypto_session(&session));
                told(live.close_crypto_session(SessionId(7)));
            }
            10 => told(live.shared_object(Uuid { bytes: [3; 16] })),
            11 => {
                let log = DirtyLog::new(memory_file(4096), log_size(&self.memory), 0);
                told(live.start_log(Arc::new(log)));
                told(live.notify_log(self.eventfds.0.as_fd()));
            }
            12 => told(live.stop_log()),
            13 => {
                let how = self.draw(|input| input.pick(&[Shutdown::Write, Shutdown::Both]));
                self.peer.hang_up(how);
            }
            _ => {
                let _ = (live.features(), live.inflight().map(|area| area.size()), live.stats());
            }
        }
        Stage::Live(live)
    }
}
