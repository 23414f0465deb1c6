//! What the vfio-user client costs on this host, without a guest: `transport` on one side of a socket,
//! `vfio-user-engine` on the other. `make bench` runs it optimised; prints lines of a table, or JSON with
//! `--json`.
//!
//! ```text
//! cargo run --release -p outboard-tests --example vfio_figures
//! ```

use std::error::Error;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use outboard_tests::vfio::Server;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use serde_json::{Map, Value, json};
use transport::memory::{GuestAddr, MemoryMap, SharedRegion};
use transport::peer::Limits;
use transport::vfio_user::{Client, IrqIndex, RegionIndex, Served, Sharing, SmallWrite};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const BAR: RegionIndex = RegionIndex(0);
const SCRATCH: u64 = 0x08;
const RAISE: u64 = 0x38;
const SINK: u64 = 0x50;
const SINK_COUNT: u64 = 0x54;
const RAISE_OFTEN: u64 = 0x60;
const GIB: u64 = 1 << 30;
/// Writes in one REGION_WRITE_MULTI.
const MANY: u32 = 64;

fn connect(server: &Server) -> Result<Client> {
    let client = Client::connect(&server.socket(), &Limits::new(Duration::from_secs(20)))?;
    let mut receiver = client.receiver()?;
    // As in the VMM, one thread receives for whoever waits.
    thread::spawn(move || {
        loop {
            let mut fds = [PollFd::new(&receiver, PollFlags::IN)];
            if poll(&mut fds, None).is_err() || !matches!(receiver.serve(), Ok(Served::Messages(_))) {
                return;
            }
        }
    });
    Ok(client)
}

fn register(client: &Client, offset: u64) -> Result<u32> {
    let mut bytes = [0; 4];
    client.read(BAR, offset, &mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

/// How often a second, from the first to what `end` waits for.
fn rate(
    count: u32,
    mut once: impl FnMut(u32) -> Result<()>,
    end: impl FnOnce() -> Result<()>,
) -> Result<f64> {
    let begun = Instant::now();
    for number in 0..count {
        once(number)?;
    }
    end()?;
    Ok(f64::from(count) / begun.elapsed().as_secs_f64())
}

/// Waits until the server has taken all writes of the sink.
fn all_arrived(client: &Client, before: u32, count: u32) -> Result<()> {
    let seen = register(client, SINK_COUNT)?.wrapping_sub(before);
    if seen == count { Ok(()) } else { Err(format!("{seen} of {count} writes have arrived").into()) }
}

fn writes(client: &Client, figures: &mut Map<String, Value>) -> Result<()> {
    const COUNT: u32 = 50_000;
    let nothing = || Ok(());
    let read = |_| register(client, SCRATCH).map(|_| ());
    figures.insert("trapped_reads_per_s".into(), json!(rate(COUNT, read, nothing)?));
    let write = |number: u32| Ok(client.write(BAR, SINK, &number.to_le_bytes())?);
    figures.insert("waited_writes_per_s".into(), json!(rate(COUNT, write, nothing)?));
    let before = register(client, SINK_COUNT)?;
    let post = |number: u32| Ok(client.post_write(BAR, SINK, &number.to_le_bytes())?);
    let arrived = || all_arrived(client, before, 4 * COUNT);
    figures.insert("posted_writes_per_s".into(), json!(rate(4 * COUNT, post, arrived)?));
    Ok(())
}

fn writes_together(client: &Client, figures: &mut Map<String, Value>) -> Result<()> {
    const BATCHES: u32 = 2000;
    let batch: Option<Vec<SmallWrite>> =
        (0..MANY).map(|number| SmallWrite::new(BAR, SINK, &number.to_le_bytes())).collect();
    let batch = batch.ok_or("a write of four bytes")?;
    let before = register(client, SINK_COUNT)?;
    let arrived = || all_arrived(client, before, BATCHES * MANY);
    let batches = rate(BATCHES, |_| Ok(client.post_write_multi(&batch)?), arrived)?;
    figures.insert("multi_writes_per_s".into(), json!(batches * f64::from(MANY)));
    Ok(())
}

fn interrupts(client: &Client, figures: &mut Map<String, Value>) -> Result<()> {
    const ROUNDS: u32 = 20_000;
    const BURST: u32 = 200_000;
    let line: OwnedFd = eventfd(0, EventfdFlags::CLOEXEC)?;
    client.arm_irqs(IrqIndex::MSIX, &[line.as_fd()])?;
    let taken = || -> Result<u64> {
        let mut count = [0; 8];
        rustix::io::read(&line, &mut count)?;
        Ok(u64::from_ne_bytes(count))
    };
    // One at a time: a posted write asks for it, the eventfd brings it.
    let one = |_| {
        client.post_write(BAR, RAISE, &0_u32.to_le_bytes())?;
        taken().map(|_| ())
    };
    figures.insert("interrupts_asked_for_per_s".into(), json!(rate(ROUNDS, one, || Ok(()))?));
    let begun = Instant::now();
    client.post_write(BAR, RAISE_OFTEN, &BURST.to_le_bytes())?;
    let mut seen = 0;
    while seen < u64::from(BURST) {
        seen += taken()?;
    }
    figures
        .insert("interrupts_signalled_per_s".into(), json!(f64::from(BURST) / begun.elapsed().as_secs_f64()));
    Ok(())
}

/// Address space is reserved, not touched.
fn maps(client: &Client, figures: &mut Map<String, Value>) -> Result<()> {
    for gib in [1, 4, 64] {
        let file = Arc::new(memfd_create("figures", MemfdFlags::CLOEXEC)?);
        ftruncate(&*file, gib * GIB)?;
        // As a machine has it: the hole below 4 GiB makes two regions of more than 3 GiB.
        let low = gib.min(3) * GIB;
        let mut regions = vec![SharedRegion::new(GuestAddr(0), low, Arc::clone(&file), 0)];
        if gib > 3 {
            regions.push(SharedRegion::new(GuestAddr(4 * GIB), gib * GIB - low, Arc::clone(&file), low));
        }
        let memory = MemoryMap::new(regions)?;
        let mut best = f64::INFINITY;
        for _ in 0..20 {
            let begun = Instant::now();
            client.dma_map_all(&memory, Sharing::Descriptor)?;
            best = best.min(begun.elapsed().as_secs_f64() * 1e6);
            client.dma_unmap_all()?;
        }
        figures.insert(format!("dma_map_{gib}_gib_us"), json!(best));
    }
    Ok(())
}

fn main() -> Result<()> {
    let mut figures = Map::new();
    let plain = Server::engine(&[]);
    let client = connect(&plain)?;
    writes(&client, &mut figures)?;
    interrupts(&client, &mut figures)?;
    maps(&client, &mut figures)?;
    let extended = Server::engine(&["--wire", "extended"]);
    writes_together(&connect(&extended)?, &mut figures)?;
    if std::env::args().any(|argument| argument == "--json") {
        println!("{:#}", Value::Object(figures));
        return Ok(());
    }
    println!("vfio-user client and vfio-user-engine, on this host:");
    for (name, figure) in figures {
        println!("  {:<30} {:>12.0}", name.replace('_', " "), figure.as_f64().unwrap_or(0.0));
    }
    Ok(())
}
