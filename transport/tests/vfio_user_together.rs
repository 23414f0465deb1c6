//! Everything at once on one vfio-user connection: threads that read and post, a receiver, and a server that asks for
//! DMA meanwhile.

#![cfg(test)]

mod support;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use support::{GuestMemory, eventually};
use transport::memory::{MemoryAccess, MemoryMap};
use transport::peer::Limits;
use transport::testing::vfio_user::{Act, Ask, Offer, Script, ScriptedServer};
use transport::vfio_user::message::Command;
use transport::vfio_user::{Client, RegionIndex, Served, Sharing};

const BAR: RegionIndex = RegionIndex(0);
const PATIENT: Duration = Duration::from_secs(20);

fn connect(offer: Offer, script: Script) -> (ScriptedServer, Client) {
    let (server, stream) = ScriptedServer::pair(offer, script).unwrap();
    (server, Client::from_stream(stream, "scripted", &Limits::new(PATIENT)).unwrap())
}

fn serve(client: &Client) -> JoinHandle<()> {
    let mut receiver = client.receiver().unwrap();
    std::thread::spawn(move || {
        loop {
            let mut fds = [PollFd::new(&receiver, PollFlags::IN)];
            poll(&mut fds, None).unwrap();
            match receiver.serve() {
                Ok(Served::Messages(_)) => {}
                Ok(Served::HungUp) | Err(_) => return,
            }
        }
    })
}

#[test]
fn reads_posted_writes_and_dma_of_the_server_do_not_mix_up() {
    for (twin, with_receiver) in [(false, false), (false, true), (true, false), (true, true)] {
        let (server, client) = connect(Offer { twin, ..Offer::default() }, Script::normal());
        let memory = GuestMemory::new(2 << 20);
        client.dma_map_all(&memory.map, Sharing::Messages).unwrap();
        let receiver = with_receiver.then(|| serve(&client));
        let over = AtomicBool::new(false);
        let asked = std::thread::scope(|scope| {
            let asker = scope.spawn(|| {
                let mut asked = 0u32;
                // Once at least: on a busy machine the others may be done before this one begins.
                while asked == 0 || !over.load(Ordering::Relaxed) && asked < 2000 {
                    let at = u64::from(asked % 256) * 8;
                    server.ask(&Ask::write(at, &u64::from(asked).to_le_bytes())).unwrap();
                    asked += 1;
                    // Not more than the sockets hold: nobody takes the replies of a twin here.
                    std::thread::sleep(Duration::from_micros(if twin { 500 } else { 50 }));
                }
                asked
            });
            let readers: Vec<_> = (0..4u64)
                .map(|thread| {
                    let client = &client;
                    scope.spawn(move || {
                        for n in 0..250u64 {
                            let (at, value) = (thread * 0x100 + n % 8 * 8, n << 8 | thread);
                            client.post_write(BAR, at, &value.to_le_bytes()).unwrap();
                            let mut data = [0; 8];
                            client.read(BAR, at, &mut data).unwrap();
                            assert_eq!(u64::from_le_bytes(data), value);
                        }
                    })
                })
                .collect();
            readers.into_iter().for_each(|reader| reader.join().unwrap());
            over.store(true, Ordering::Relaxed);
            asker.join().unwrap()
        });
        let what = format!("twin={twin} receiver={with_receiver}");
        eventually(&what, PATIENT, || {
            // Without a receiver the server is heard when something is asked.
            client.device_info().unwrap();
            client.stats().dma_writes == u64::from(asked)
        });
        let last = u64::from(asked - 1);
        assert_eq!(memory.read(last % 256 * 8, 8), last.to_le_bytes(), "{what}");
        let stats = client.stats();
        assert_eq!(
            (stats.exchanges.failures, stats.late, stats.server_refusals, stats.posted),
            (0, 0, 0, 1000),
            "{what}"
        );
        assert_eq!(server.breaches(), Vec::<String>::new(), "{what}");
        client.shut_down();
        if let Some(receiver) = receiver {
            receiver.join().unwrap();
        }
    }
}

#[test]
fn posted_writes_are_joined_while_the_server_is_slow_and_keep_their_order() {
    let pause = Duration::from_secs(4);
    let slow = Script::normal().on_nth(Command::REGION_WRITE, 0, Act::Delay(pause));
    let (server, client) = connect(Offer::default(), slow);
    let receiver = serve(&client);
    let begin = std::time::Instant::now();
    for n in 0..5_000u32 {
        client.post_write(BAR, 0, &n.to_le_bytes()).unwrap();
    }
    assert!(begin.elapsed() < pause, "nobody waited for the server: {:?}", begin.elapsed());
    client.post_write(BAR, 8, &[7; 12]).unwrap();
    let mut data = [0; 4];
    client.read(BAR, 0, &mut data).unwrap();
    assert_eq!(u32::from_le_bytes(data), 4999);
    assert!(server.count(Command::REGION_WRITE_MULTI) > 0);
    let seen = server.count(Command::REGION_WRITE);
    assert!(seen < 5000, "{seen} were not joined");
    assert_eq!(client.stats().posted, 5001);
    drop(client);
    receiver.join().unwrap();
}

#[test]
fn what_is_posted_goes_out_while_another_thread_waits_for_a_slow_answer() {
    let pause = Act::Delay(Duration::from_millis(300));
    let script = Script::normal().on_nth(Command::REGION_READ, 0, Act::Silent);
    let script = script.on_nth(Command::REGION_WRITE, 0, pause);
    let (server, client) = connect(Offer::default(), script);
    let receiver = serve(&client);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| client.read(BAR, 0, &mut [0; 4]));
        eventually("the question came", PATIENT, || server.count(Command::REGION_READ) == 1);
        // Whose answer the waiting thread reads, too: by now it has nothing to do but to wait.
        client.read(BAR, 0, &mut [0; 4]).unwrap();
        // More than the socket holds while the server pauses.
        for n in 1..=5_000u32 {
            client.post_write(BAR, 0, &n.to_le_bytes()).unwrap();
        }
        eventually("the last write came", PATIENT / 4, || server.region(0)[..4] == 5_000u32.to_le_bytes());
        assert!(!reader.is_finished());
        client.shut_down();
        reader.join().unwrap().unwrap_err();
    });
    receiver.join().unwrap();
}

#[test]
fn a_server_that_asks_for_much_at_once_is_answered_in_pieces_and_whole() {
    const ASKS: usize = 150;
    let (server, client) = connect(Offer::default(), Script::normal());
    let memory = GuestMemory::new(2 << 20);
    client.dma_map_all(&memory.map, Sharing::Messages).unwrap();
    let mut receiver = client.receiver().unwrap();
    for _ in 0..ASKS {
        server.ask(&Ask::read(0, 128 << 10)).unwrap();
    }
    // Far more than may wait for a server that is slow to take it; and others want to be served meanwhile.
    let mut most = 0;
    eventually("all answers came", PATIENT, || {
        let mut fds = [PollFd::new(&receiver, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 1_000_000 })).unwrap();
        if fds[0].revents().contains(PollFlags::IN) {
            let Ok(Served::Messages(count)) = receiver.serve() else { panic!("it is lost") };
            most = most.max(count);
        }
        server.answers().len() == ASKS
    });
    assert!(most <= 65, "{most} requests of 128 KiB in one go");
    assert!(server.answers().iter().all(|answer| answer.payload.len() == 16 + (128 << 10)));
    client.device_info().unwrap();
}

/// Memory that is nobody's file.
#[derive(Debug, Default)]
struct Recorder {
    writes: Mutex<Vec<(u64, usize)>>,
}

impl MemoryAccess for Recorder {
    fn read(&self, at: u64, data: &mut [u8]) -> io::Result<()> {
        data.fill(u8::try_from(at & 0xff).unwrap());
        Ok(())
    }

    fn write(&self, at: u64, data: &[u8]) -> io::Result<()> {
        if at == 0x666 {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.writes.lock().unwrap().push((at, data.len()));
        Ok(())
    }

    fn store_index(&self, _at: u64, _index: u16) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[test]
fn guest_memory_is_reached_the_way_the_machine_says() {
    let asks = vec![Ask::read(0x1042, 3), Ask::write(0x2000, &[1; 9]), Ask::write(0x666, &[1])];
    let script = Script::normal().on(Command::DEVICE_RESET, Act::Asks(asks));
    let (server, stream) = ScriptedServer::pair(Offer::default(), script).unwrap();
    let recorder = Arc::new(Recorder::default());
    let client = Client::from_stream(stream, "scripted", &Limits::new(PATIENT)).unwrap();
    let memory = GuestMemory::new(2 << 20);
    let access: Arc<dyn MemoryAccess> = Arc::<Recorder>::clone(&recorder);
    let region = memory.map.regions()[0].clone().with_access(access);
    client.dma_map_all(&MemoryMap::new(vec![region]).unwrap(), Sharing::Messages).unwrap();
    client.reset().unwrap();
    let answers = server.answers();
    assert_eq!(&answers[0].payload[16..], [0x42; 3]);
    assert_eq!(*recorder.writes.lock().unwrap(), [(0x2000, 9)]);
    assert_eq!((answers[2].header.flags, answers[2].header.errno), (0x21, 14));
}
