//! vfio-user DMA_LOGGING_START, DMA_LOGGING_STOP, DMA_LOGGING_REPORT: the pages that the device wrote.
//!
//! Must never lose a write: a report that the server leaves empty counts as a report of all pages. The
//! reports do not include writes by message (DMA_WRITE). The code that writes guest memory for the server
//! marks those pages itself.

use zerocopy::IntoBytes;

use crate::memory::{GuestAddr, PAGE};
use crate::peer::{Cause, Error};
use crate::vfio_user::client::Client;
use crate::vfio_user::message::{
    Command, Fault, Feature, LoggingRange, LoggingReport, LoggingStart, length, parse_front,
};

/// The most pages in one report: a bitmap of 128 KiB. A multiple of 64, as a report must begin at a multiple
/// of 64 pages.
const PAGES_AT_ONCE: u64 = 1 << 20;

/// The most ranges in one DMA_LOGGING_START.
const RANGES_MOST: usize = 1024;

/// A range of DMA addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaRange {
    /// The first address.
    pub at: GuestAddr,
    /// Bytes.
    pub length: u64,
}

/// A bitmap of the pages that were written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyPages {
    /// The guest address of the first page.
    pub at: GuestAddr,
    /// Bytes that one bit stands for.
    pub page_size: u64,
    /// The bits. The first page is the lowest bit.
    pub words: Vec<u64>,
}

/// Reads the data of a DMA_LOGGING_REPORT of `pages` pages, from the start of `asked` on. Pure, so that it
/// can be fuzzed.
///
/// # Errors
/// When the report is about another range, or has too few or too many bits. Bits past the end count as clear.
pub fn parse_report(data: &[u8], asked: &LoggingReport, pages: u64) -> Result<Vec<u64>, Fault> {
    let words = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
    let last = match pages % 64 {
        0 => u64::MAX,
        used => (1 << used) - 1,
    };
    let mut bitmap = if data.is_empty() {
        vec![u64::MAX; words]
    } else {
        let (report, bits) = parse_front::<LoggingReport>(data)?;
        if report.iova != asked.iova {
            return Err(Fault::Value { field: "iova", value: report.iova });
        }
        if bits.is_empty() {
            vec![u64::MAX; words]
        } else if Some(bits.len()) != words.checked_mul(8) {
            let due = length(words.saturating_mul(8));
            return Err(Fault::Size { got: length(bits.len()), least: due, most: due });
        } else {
            bits.chunks_exact(8).map(|word| word.try_into().map_or(u64::MAX, u64::from_ne_bytes)).collect()
        }
    };
    if let Some(word) = bitmap.last_mut() {
        *word &= last;
    }
    Ok(bitmap)
}

/// Reads the data of a DMA_LOGGING_START reply: the page size that the device chose. Pure, so that it can be
/// fuzzed.
///
/// # Errors
/// When the page size is not a power of two, is below 4096, or is larger than any memory.
pub fn parse_logging_start(data: &[u8], asked: u64) -> Result<u64, Fault> {
    if data.is_empty() {
        return Ok(asked);
    }
    let (start, _) = parse_front::<LoggingStart>(data)?;
    let size = start.page_size;
    if size.is_power_of_two() && (PAGE..=1 << 40).contains(&size) {
        Ok(size)
    } else {
        Err(Fault::Value { field: "page size", value: size })
    }
}

impl Client {
    /// Starts logging of the device's writes to `ranges`, or to all memory when there are no ranges. Returns
    /// the page size that the device logs with.
    ///
    /// # Errors
    /// When the server refuses or fails, or chooses an impossible page size.
    pub fn start_dma_logging(&self, page_size: u64, ranges: &[DmaRange]) -> Result<u64, Error> {
        let command = Command::DEVICE_FEATURE;
        if ranges.len() > RANGES_MOST {
            return Err(self.error(command, Cause::Invalid("there are too many ranges to log")));
        }
        let start = LoggingStart { page_size, count: length(ranges.len()), reserved: 0 };
        let mut data = start.as_bytes().to_vec();
        for range in ranges {
            data.extend_from_slice(LoggingRange { iova: range.at.raw(), length: range.length }.as_bytes());
        }
        let reply = self.set_feature(Feature::DMA_LOGGING_START, &data)?;
        parse_logging_start(&reply, page_size).map_err(|fault| self.malformed(command, fault))
    }

    /// Stops logging of the device's writes.
    ///
    /// # Errors
    /// When the server refuses or fails.
    pub fn stop_dma_logging(&self) -> Result<(), Error> {
        self.set_feature(Feature::DMA_LOGGING_STOP, &[]).map(drop)
    }

    /// Reads which pages of `range` were written since the last report. `range` must lie in one mapped region
    /// and begin at a multiple of 64 pages. Sends as many messages as are needed; each has a deadline of its
    /// own.
    ///
    /// # Errors
    /// When the server refuses or fails, or its report is about another range.
    pub fn report_dma_logging(&self, range: DmaRange, page_size: u64) -> Result<DirtyPages, Error> {
        let command = Command::DEVICE_FEATURE;
        let invalid = |what| self.error(command, Cause::Invalid(what));
        if !page_size.is_power_of_two() || page_size < PAGE {
            return Err(invalid("its page size is none"));
        }
        let group = page_size.saturating_mul(64);
        let aligned = range.at.raw().is_multiple_of(group) && range.length.is_multiple_of(page_size);
        if !aligned || range.at.checked_add(range.length).is_none() {
            return Err(invalid("it does not begin on a multiple of 64 pages, or is not whole pages"));
        }
        let mut words = Vec::new();
        let mut left = range.length / page_size;
        let mut iova = range.at.raw();
        while left > 0 {
            let pages = left.min(PAGES_AT_ONCE);
            let length_asked = pages.saturating_mul(page_size);
            let asked = LoggingReport { iova, length: length_asked, page_size };
            let most = pages.div_ceil(64).saturating_mul(8).saturating_add(24);
            let most = u32::try_from(most).unwrap_or(u32::MAX);
            let data = self.get_feature(Feature::DMA_LOGGING_REPORT, asked.as_bytes(), most)?;
            let report = parse_report(&data, &asked, pages);
            words.extend(report.map_err(|fault| self.malformed(command, fault))?);
            iova = iova.saturating_add(length_asked);
            left = left.saturating_sub(pages);
        }
        Ok(DirtyPages { at: range.at, page_size, words })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: LoggingReport = LoggingReport { iova: 0x1000_0000, length: 65 * 4096, page_size: 4096 };

    fn report(words: &[u64]) -> Vec<u8> {
        [ASKED.as_bytes(), words.as_bytes()].concat()
    }

    #[test]
    fn bits_past_the_end_do_not_count() {
        assert_eq!(parse_report(&report(&[5, u64::MAX]), &ASKED, 65), Ok(vec![5, 1]));
    }

    #[test]
    fn an_empty_success_means_everything() {
        assert_eq!(parse_report(&[], &ASKED, 65), Ok(vec![u64::MAX, 1]));
        assert_eq!(parse_report(&report(&[]), &ASKED, 65), Ok(vec![u64::MAX, 1]));
    }

    #[test]
    fn too_short_too_long_and_elsewhere_are_refused() {
        for words in [1, 3] {
            assert!(matches!(parse_report(&report(&vec![0; words]), &ASKED, 65), Err(Fault::Size { .. })));
        }
        let elsewhere = LoggingReport { iova: 0, ..ASKED };
        assert!(parse_report(&report(&[0, 0]), &elsewhere, 65).is_err());
        assert!(parse_report(&[0; 23], &ASKED, 65).is_err());
    }

    #[test]
    fn a_page_size_is_a_power_of_two_of_some_size() {
        let start = |page_size| LoggingStart { page_size, count: 0, reserved: 0 }.as_bytes().to_vec();
        assert_eq!(parse_logging_start(&start(1 << 21), 4096), Ok(1 << 21));
        assert_eq!(parse_logging_start(&[], 4096), Ok(4096));
        for size in [0, 3, 2048, 1 << 63, 4097] {
            assert!(parse_logging_start(&start(size), 4096).is_err(), "{size:#x}");
        }
    }
}
