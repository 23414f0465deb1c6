//! A vfio-user client's whole life, with a server that follows a script.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use transport::memory::GuestAddr;
use transport::peer::{Error, Limits, Step};
use transport::testing::vfio_user::{Offer, Script, ScriptedServer};
use transport::vfio_user::message::Command;
use transport::vfio_user::migration::{DmaRange, FeatureUse, MigrationState};
use transport::vfio_user::{Client, Feature, IrqIndex, RegionIndex, Sharing, SmallWrite};

use super::{GuestMemory, open_fds};

type C = Command;

/// What a row comes to.
#[derive(Clone, Debug)]
pub enum End {
    /// The connection is over, at this step, with these words in the error.
    Lost(Command, &'static str),
    /// The same, whatever the step.
    LostAnywhere(&'static str),
    /// The command fails with these words and the connection goes on.
    Fails(Command, &'static str),
    /// Nobody notices.
    Works,
}

impl End {
    fn step(&self) -> Option<Step> {
        match self {
            Lost(command, _) | Fails(command, _) => Some(Step::Request((*command).into())),
            LostAnywhere(_) | Works => None,
        }
    }
}

use End::{Fails, Lost, LostAnywhere, Works};

/// Rows count descriptors, so they run one at a time.
pub static ALONE: Mutex<()> = Mutex::new(());

pub const PATIENT: Duration = Duration::from_secs(10);
pub const BRIEF: Duration = Duration::from_millis(150);

pub fn eventfds(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()).collect()
}

/// Everything that a client asks, once.
pub fn life(client: &Client, memory: &GuestMemory) -> Result<(), Error> {
    let bar = RegionIndex(0);
    let info = client.device_info()?;
    let mut doorbells = 0;
    for index in 0..info.regions.min(9) {
        let region = client.region_info(RegionIndex(index))?;
        if index == 0 {
            doorbells += client.region_io_fds(&region)?.len();
            for area in &region.areas {
                assert!(area.size > 0 && area.size % 4096 == 0 && area.offset + area.size <= region.size);
            }
        }
    }
    assert!(doorbells <= 512);
    for index in 0..info.irqs.min(5) {
        client.irq_info(IrqIndex(index))?;
    }
    client.dma_map_all(&memory.map, Sharing::Descriptor)?;
    let events = eventfds(6);
    let fds: Vec<_> = events.iter().map(AsFd::as_fd).collect();
    client.arm_irqs(IrqIndex::MSIX, &fds)?;
    client.write(bar, 0x20, &[1, 2, 3, 4])?;
    client.post_write(bar, 0x24, &[5, 6, 7, 8])?;
    client.write_multi(&[SmallWrite::new(bar, 0x28, &[9; 8]).unwrap()])?;
    let mut data = [0; 16];
    client.read(bar, 0x20, &mut data)?;
    assert_eq!(data[..9], [1, 2, 3, 4, 5, 6, 7, 8, 9]);
    client.reset()?;
    assert!(client.migration()?.is_none_or(|support| support.stop_copy()));
    client.has_feature(Feature::DMA_LOGGING_START, FeatureUse::Set)?;
    let page = client.start_dma_logging(4096, &[DmaRange { at: GuestAddr(0), length: 2 << 20 }])?;
    assert!(page >= 4096);
    let report = client.report_dma_logging(DmaRange { at: GuestAddr(0), length: 2 << 20 }, 4096)?;
    assert_eq!(report.words.len(), 8);
    client.stop_dma_logging()?;
    client.set_migration_state(MigrationState::StopCopy)?;
    client.migration_state()?;
    let mut saved = Vec::new();
    client.save_migration_data(&mut saved, 1 << 20)?;
    client.set_migration_state(MigrationState::Resuming)?;
    client.load_migration_data(&mut saved.as_slice())?;
    client.set_migration_state(MigrationState::Running)?;
    client.disable_irqs(IrqIndex::MSIX)?;
    client.dma_unmap_all()?;
    // What came too much is found by the next question at the latest.
    client.device_info().map(drop)
}

pub fn live(offer: Offer, script: Script, deadline: Duration) -> (Result<(), Error>, ScriptedServer, bool) {
    let memory = GuestMemory::new(2 << 20);
    let (server, stream) = ScriptedServer::pair(offer, script).unwrap();
    match Client::from_stream(stream, "scripted", &Limits::new(deadline)) {
        Ok(client) => {
            let outcome = life(&client, &memory);
            let lost = client.is_lost();
            (outcome, server, lost)
        }
        Err(error) => (Err(error), server, true),
    }
}

pub fn row(what: &str, offer: impl Fn() -> Offer, script: Script, deadline: Duration, end: &End) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    // What a row leaves to the kernel goes when its sockets do.
    let before = open_fds();
    let begin = Instant::now();
    let (mut outcome, mut server, mut lost);
    let mut deadline = deadline;
    loop {
        (outcome, server, lost) = live(offer(), script.clone(), deadline);
        // On a busy machine a good answer may take longer than a short deadline.
        let elsewhere =
            |error: &Error| error.is_silence() && end.step().is_some_and(|step| step != error.step());
        if deadline >= PATIENT / 4 || !outcome.as_ref().is_err_and(elsewhere) {
            break;
        }
        deadline *= 4;
    }
    let took = begin.elapsed();
    assert!(took < PATIENT, "{what}: took {took:?}");
    let words = outcome.as_ref().map_or_else(ToString::to_string, |()| "it works".to_owned());
    match (end, &outcome) {
        (Lost(command, expected), Err(error)) => {
            assert!(error.is_fatal() && lost, "{what}: {words}");
            let at = [Step::Request((*command).into()), Step::PeerRequest((*command).into())];
            assert!(at.contains(&error.step()), "{what}: {words}");
            assert!(words.contains(expected), "{what}: {words}");
        }
        (LostAnywhere(expected), Err(error)) => {
            assert!(error.is_fatal() && lost, "{what}: {words}");
            assert!(words.contains(expected), "{what}: {words}");
        }
        (Fails(command, expected), Err(error)) => {
            assert!(!lost || *command == C::VERSION, "{what}: {words}");
            assert_eq!(error.step(), Step::Request((*command).into()), "{what}: {words}");
            assert!(words.contains(expected), "{what}: {words}");
        }
        (Works, Ok(())) => assert_eq!(server.breaches(), Vec::<String>::new(), "{what}"),
        _ => panic!("{what}: {words}, and not {end:?}"),
    }
    drop(outcome);
    drop(server);
    assert_eq!(open_fds(), before, "{what}: descriptors");
}
