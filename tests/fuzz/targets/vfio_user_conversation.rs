//! Whole conversations with a vfio-user server that says what it likes: every command there is, with and
//! without a twin socket, with a receiver and without. Nothing is left open, whatever the end.
#![no_main]

use std::net::Shutdown;
use std::os::fd::AsFd;

use fuzz::descriptors::{guest_memory, memory_file, none_left};
use fuzz::input::Input;
use fuzz::seeds::{offer, spaced};
use fuzz::server::Server;
use libfuzzer_sys::fuzz_target;
use transport::memory::GuestAddr;
use transport::peer::Error;
use transport::vfio_user::migration::{DmaRange, MigrationState};
use transport::vfio_user::{
    Client, IrqIndex, Receiver, RegionIndex, RegionInfo, Served, Sharing, SmallWrite,
};

/// Operations of one conversation; each is a few messages.
const STEPS: usize = 24;

fuzz_target!(init: offer(&seeds()), |data: &[u8]| {
    none_left(|| converse(data));
});

/// Each operation on its own, with one socket and with two.
fn seeds() -> Vec<Vec<u8>> {
    let one = |op: u8| [vec![0; 4], spaced(&[op])].concat();
    let two = |op: u8| [vec![1; 4], spaced(&[op, op])].concat();
    (1..24).map(one).chain((1..24).map(two)).collect()
}

/// Every error can be told.
fn told<T>(result: Result<T, Error>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            assert!(error.to_string().contains("fuzz"), "{error}");
            let _ = (error.hint(), error.is_fatal(), error.is_absent(), error.is_silence());
            None
        }
    }
}

fn converse(data: &[u8]) {
    let (server, client) = Server::new(Input::new(data));
    let Some(client) = told(client) else { return };
    let mut receiver = if server.draw(Input::byte) & 1 == 1 { client.receiver().ok() } else { None };
    let mut bar = None;
    for _ in 0..STEPS {
        if server.draw(|input| input.is_empty()) || client.is_lost() {
            break;
        }
        let op = server.draw(Input::byte);
        step(op, &server, &client, &mut bar);
        server.drain();
        serve(receiver.as_mut());
    }
    let stats = client.stats();
    assert!(stats.refusals <= stats.exchanges.answers);
}

fn serve(receiver: Option<&mut Receiver>) {
    if let Some(receiver) = receiver
        && let Some(Served::HungUp) = told(receiver.serve())
    {
        assert_eq!(receiver.serve().ok(), Some(Served::HungUp));
    }
}

fn step(op: u8, server: &Server, client: &Client, bar: &mut Option<RegionInfo>) {
    let region = RegionIndex(0);
    match op % 24 {
        1 => drop(told(client.device_info())),
        2 => {
            *bar = told(client.region_info(region));
            if let Some(bar) = bar {
                let inside = |area: &transport::vfio_user::Area| area.offset + area.size <= bar.size;
                assert!(bar.areas.iter().all(inside) && (bar.fd.is_some() || bar.areas.is_empty()));
            }
        }
        3 => {
            if let Some(bells) = bar.as_ref().and_then(|bar| told(client.region_io_fds(bar))) {
                assert!(bells.len() <= 512);
            }
        }
        4 => drop(told(client.irq_info(IrqIndex::MSIX))),
        5 => {
            let sharing = server.draw(|input| input.pick(&[Sharing::Messages, Sharing::Descriptor]));
            told(client.dma_map_all(&guest_memory(), sharing));
        }
        6 => drop(told(client.dma_unmap_all())),
        7 => {
            let event = memory_file(8);
            let count = server.draw(|input| input.below(12));
            told(client.arm_irqs(IrqIndex::MSIX, &vec![event.as_fd(); count]));
        }
        8 => drop(told(client.disable_irqs(IrqIndex::MSIX))),
        9 => {
            let (at, size) = server.draw(|input| (input.number(), input.below(80)));
            told(client.read(region, at, &mut vec![0; size]));
        }
        10 => {
            let (at, data) = server.draw(|input| (input.number(), input.bytes(80)));
            told(client.write(region, at, &data));
        }
        11 => {
            let (at, data) = server.draw(|input| (input.number(), input.bytes(16)));
            told(client.post_write(region, at, &data));
        }
        12 => {
            let write = SmallWrite::new(region, 8, &[1, 2, 3, 4]).expect("4 bytes");
            told(client.write_multi(&vec![write; server.draw(|input| input.below(300))]));
            told(client.post_write_multi(&[write; 3]));
        }
        13 => drop(told(client.reset())),
        14 => drop(told(client.migration())),
        15 => drop(told(client.migration_state())),
        16 => drop(told(client.set_migration_state(MigrationState::StopCopy))),
        17 => {
            let mut state = Vec::new();
            let most = server.draw(Input::number);
            if let Some(moved) = told(client.save_migration_data(&mut state, most)) {
                assert!(moved == state.len() as u64 && moved <= most);
            }
        }
        18 => drop(told(client.load_migration_data(&mut [7; 5000].as_slice()))),
        19 => {
            let range = DmaRange { at: GuestAddr(0), length: 4 << 20 };
            told(client.start_dma_logging(4096, &[range]));
            if let Some(pages) = told(client.report_dma_logging(range, 4096)) {
                assert_eq!(pages.words.len(), 16);
            }
            told(client.stop_dma_logging());
        }
        20 => {
            // Several on their way, some of them waited for.
            let reads: Vec<_> = (0..8).map(|n| client.begin_read(region, n * 4, 4)).collect();
            for (number, read) in reads.into_iter().enumerate() {
                if let Some(read) = told(read)
                    && number % 3 > 0
                {
                    told(read.wait(&mut [0; 4]));
                }
            }
        }
        21 => server.ask(),
        22 => server.hang_up(server.draw(|input| input.pick(&[Shutdown::Write, Shutdown::Both]))),
        _ => drop((client.version().is_extended(), client.stats(), told(client.hang_up()))),
    }
}
