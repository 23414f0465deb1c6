//! What the vfio-user client costs against a running server: `vfio_user_bench SOCKET [SECONDS]`.
//!
//! Prints lines `NAME VALUE`, rates a second and times in microseconds. Region 0 of the server must be readable and
//! writable at offset 0 by 4 bytes, as that of `vfio-user-engine` in tests/servers is; its DMA maps must be free.

use std::error::Error;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use transport::memory_map::{GuestAddr, SharedRegion};
use transport::vfio_user::{Client, DmaRights, Limits, Receiver, RegionIndex, Served, Sharing, SmallWrite};

const BAR: RegionIndex = RegionIndex(0);

/// Reads in flight at once.
const DEPTH: usize = 64;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let socket = arguments.next().ok_or("usage: vfio_user_bench SOCKET [SECONDS]")?;
    let seconds = arguments.next().map_or(Ok(1.0), |text| text.parse::<f64>())?;
    let client = Client::connect(Path::new(&socket), &Limits::new(Duration::from_secs(10)))?;
    let bench = Bench { client, time: Duration::from_secs_f64(seconds.clamp(0.01, 60.0)) };
    bench.trapped_reads("trapped_reads")?;
    let receiver = bench.client.receiver()?;
    let polling = serve(receiver);
    bench.trapped_reads("trapped_reads_beside_a_receiver")?;
    bench.reads_in_flight()?;
    bench.posted_writes()?;
    bench.multi_writes()?;
    bench.dma_maps()?;
    bench.client.shut_down();
    polling.join().map_err(|_| "the receiver failed").map_err(Into::into)
}

/// What the thread `peers` does in a machine.
fn serve(mut receiver: Receiver) -> JoinHandle<()> {
    std::thread::spawn(move || {
        loop {
            let mut fds = [PollFd::from_borrowed_fd(receiver.as_fd(), PollFlags::IN)];
            let served = poll(&mut fds, None).ok().map(|_| receiver.serve());
            if !matches!(served, Some(Ok(Served::Messages(_)))) {
                return;
            }
        }
    })
}

struct Bench {
    client: Client,
    time: Duration,
}

impl Bench {
    fn say(name: &str, count: usize, took: Duration) {
        // As precise as anybody needs.
        let per_second = (count as f64 / took.as_secs_f64()).round();
        println!("{name} {per_second}");
    }

    fn trapped_reads(&self, name: &str) -> Result<(), Box<dyn Error>> {
        let mut times = Vec::new();
        let begin = Instant::now();
        while begin.elapsed() < self.time {
            let one = Instant::now();
            self.client.read(BAR, 0, &mut [0; 4])?;
            times.push(one.elapsed());
        }
        Self::say(name, times.len(), begin.elapsed());
        times.sort_unstable();
        for percent in [50, 99] {
            let at = times.len().saturating_mul(percent) / 100;
            let time = times.get(at).copied().unwrap_or_default();
            println!("{name}_p{percent}_us {:.1}", time.as_secs_f64() * 1e6);
        }
        Ok(())
    }

    fn reads_in_flight(&self) -> Result<(), Box<dyn Error>> {
        let mut count = 0_usize;
        let begin = Instant::now();
        while begin.elapsed() < self.time {
            let pending = (0..DEPTH).map(|_| self.client.begin_read(BAR, 0, 4));
            let pending = pending.collect::<Result<Vec<_>, _>>()?;
            for read in pending {
                read.wait(&mut [0; 4])?;
            }
            count = count.saturating_add(DEPTH);
        }
        Self::say("reads_in_flight_64", count, begin.elapsed());
        Ok(())
    }

    /// Until the server has done them: the read at the end says so.
    fn posted_writes(&self) -> Result<(), Box<dyn Error>> {
        let mut count = 0_usize;
        let begin = Instant::now();
        while begin.elapsed() < self.time {
            for _ in 0..1000 {
                self.client.post_write(BAR, 0, &[0; 4])?;
            }
            count = count.saturating_add(1000);
        }
        self.client.read(BAR, 0, &mut [0; 4])?;
        Self::say("posted_writes", count, begin.elapsed());
        Ok(())
    }

    fn multi_writes(&self) -> Result<(), Box<dyn Error>> {
        if !self.client.version().agreed.write_multiple {
            return Ok(());
        }
        let write = SmallWrite::new(BAR, 0, &[0; 4]).ok_or("4 bytes are small")?;
        let writes = [write; 200];
        let mut count = 0_usize;
        let begin = Instant::now();
        while begin.elapsed() < self.time {
            self.client.write_multi(&writes)?;
            count = count.saturating_add(writes.len());
        }
        Self::say("write_multi_writes", count, begin.elapsed());
        Ok(())
    }

    fn dma_maps(&self) -> Result<(), Box<dyn Error>> {
        for gib in [1_u64, 4, 64] {
            let size = gib << 30;
            // Reserved, not touched.
            let fd = Arc::new(memfd_create("memory", MemfdFlags::CLOEXEC)?);
            ftruncate(fd.as_fd(), size)?;
            let region = SharedRegion::new(GuestAddr(0), size, fd, 0);
            let mut best = [Duration::MAX; 2];
            for _ in 0..20 {
                let begin = Instant::now();
                self.client.dma_map(&region, DmaRights::ReadWrite, Sharing::Descriptor)?;
                let mapped = begin.elapsed();
                self.client.dma_unmap(GuestAddr(0), size)?;
                let [map, unmap] = best;
                best = [map.min(mapped), unmap.min(begin.elapsed().saturating_sub(mapped))];
            }
            let [map, unmap] = best.map(|time| time.as_secs_f64() * 1e6);
            println!("dma_map_{gib}_gib_us {map:.1}");
            println!("dma_unmap_{gib}_gib_us {unmap:.1}");
        }
        Ok(())
    }
}
