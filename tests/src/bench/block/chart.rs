// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Throughput and latency against depth, as an SVG: a line of charts for each place, with a curve for each back-end.

use std::io::{self, Write};
use std::ops::Range;

use plotters::coord::Shift;
use plotters::prelude::*;

use super::DEPTHS;
use super::image::Place;
use super::load::Load;
use super::peer::Peer;
use super::report::{Cell, Report};

/// Size of one chart, and of the heading above all of them.
const CHART: (u32, u32) = (480, 330);
const HEAD: u32 = 84;
const FONT: &str = "sans-serif";
/// Colours that colour-blind readers can tell apart.
const COLOURS: [(Peer, RGBColor); 5] = [
    (Peer::Ours, RGBColor(213, 94, 0)),
    (Peer::OursPacked, RGBColor(204, 121, 167)),
    (Peer::QsdThreads, RGBColor(0, 114, 178)),
    (Peer::QsdIoUring, RGBColor(0, 158, 115)),
    (Peer::QsdIoUringIothread, RGBColor(86, 86, 86)),
];

/// Quantity that a column of charts shows.
struct Column {
    title: &'static str,
    of: fn(&Cell) -> f64,
}

const COLUMNS: [Column; 3] = [
    Column {
        title: "thousand requests/s",
        of: |cell| cell.median(|sample| sample.iops) / 1e3,
    },
    Column {
        title: "median latency, µs",
        of: |cell| cell.median(|sample| sample.p50_us),
    },
    Column {
        title: "99th percentile of the latency, µs",
        of: |cell| cell.median(|sample| sample.p99_us),
    },
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type DrawError = Box<dyn std::error::Error>;

/// Draws the report's random 4 KiB reads on one queue.
///
/// # Errors
/// The report has none, or the file cannot be written.
pub fn draw(report: &Report, mut to: impl Write) -> Result<(), DrawError> {
    let curves = |place: Place| -> Vec<(Peer, RGBColor, Vec<&Cell>)> {
        let of_peer = |(peer, colour)| {
            let at = |&depth: &u16| report.cell(place, Load::random(false, depth, 1), peer);
            (peer, colour, DEPTHS.iter().filter_map(at).collect())
        };
        let curves = COLOURS.into_iter().map(of_peer);
        curves
            .filter(|(_, _, cells): &(_, _, Vec<_>)| !cells.is_empty())
            .collect()
    };
    let places: Vec<_> = Place::STORAGE
        .into_iter()
        .map(|place| (place, curves(place)))
        .filter(|(_, curves)| !curves.is_empty())
        .collect();
    if places.is_empty() {
        return Err(
            io::Error::other("no random reads of 4 KiB to draw; measure with --sweep").into(),
        );
    }
    let mut text = String::new();
    {
        let width = CHART.0 * COLUMNS.len() as u32;
        let size = (width, HEAD + CHART.1 * places.len() as u32);
        let root = SVGBackend::with_string(&mut text, size).into_drawing_area();
        root.fill(&WHITE)?;
        let (head, charts) = root.split_vertically(HEAD);
        draw_head(&head, report, &places)?;
        let areas = charts.split_evenly((places.len(), COLUMNS.len()));
        let cells = places
            .iter()
            .flat_map(|place| COLUMNS.iter().map(move |column| (place, column)));
        for (area, ((place, curves), column)) in areas.iter().zip(cells) {
            draw_chart(area, *place, curves, column)?;
        }
        root.present()?;
    }
    to.write_all(text.as_bytes())?;
    Ok(())
}

type Curves<'a> = Vec<(Peer, RGBColor, Vec<&'a Cell>)>;

/// Heading: what was measured, where and when, and the legend.
fn draw_head(area: &Area, report: &Report, places: &[(Place, Curves)]) -> Result<(), DrawError> {
    let text =
        |text: &str, at, size| area.draw(&Text::new(text.to_owned(), at, (FONT, size).into_font()));
    text(
        "Random reads of 4 KiB against the number of them in flight",
        (16, 10),
        20,
    )?;
    text(
        &format!("{}; {}", report.machine.name(), report.date),
        (16, 36),
        14,
    )?;
    let mut left = 16;
    for (peer, colour) in COLOURS {
        let drawn =
            |(_, curves): &(Place, Curves)| curves.iter().any(|(drawn, _, _)| *drawn == peer);
        if !places.iter().any(drawn) {
            continue;
        }
        area.draw(&PathElement::new(
            [(left, 67), (left + 28, 67)],
            stroke(peer, colour),
        ))?;
        text(peer.name(), (left + 34, 60), 14)?;
        left += 60 + 8 * peer.name().len() as i32;
    }
    Ok(())
}

/// Highlights our own back-end.
fn stroke(peer: Peer, colour: RGBColor) -> ShapeStyle {
    colour.stroke_width(if peer.is_ours() { 3 } else { 2 })
}

fn draw_chart(
    area: &Area,
    place: Place,
    curves: &Curves,
    column: &Column,
) -> Result<(), DrawError> {
    let cells = || curves.iter().flat_map(|(_, _, cells)| cells);
    let depths = octaves(cells().map(|cell| f64::from(cell.load.depth)));
    let values = octaves(cells().map(|cell| (column.of)(cell)));
    let mut chart = ChartBuilder::on(area)
        .caption(format!("{}: {}", place.title(), column.title), (FONT, 15))
        .margin(12)
        .x_label_area_size(34)
        .y_label_area_size(48)
        .build_cartesian_2d(depths.log_scale().base(2.0), values.log_scale().base(2.0))?;
    chart
        .configure_mesh()
        .x_desc("requests in flight")
        .x_labels(10)
        .y_labels(10)
        .max_light_lines(0)
        .x_label_formatter(&label)
        .y_label_formatter(&label)
        .label_style((FONT, 12))
        .bold_line_style(BLACK.mix(0.15))
        .draw()?;
    for (peer, colour, cells) in curves {
        let points = cells
            .iter()
            .map(|cell| (f64::from(cell.load.depth), (column.of)(cell)));
        let style = stroke(*peer, *colour);
        chart
            .draw_series(LineSeries::new(points, style.filled()).point_size(style.stroke_width))?;
    }
    Ok(())
}

/// Powers of two around all numbers.
fn octaves(numbers: impl Iterator<Item = f64>) -> Range<f64> {
    let logarithms = numbers.filter(|number| *number > 0.0).map(f64::log2);
    let bounds = logarithms.fold(None, |bounds: Option<(f64, f64)>, logarithm| {
        let (least, most) = bounds.unwrap_or((logarithm, logarithm));
        Some((least.min(logarithm), most.max(logarithm)))
    });
    let (least, most) = bounds.unwrap_or_default();
    least.floor().exp2()..most.ceil().max(least.floor() + 1.0).exp2()
}

fn label(number: &f64) -> String {
    match *number {
        1.0.. => format!("{number:.0}"),
        _ => format!("{number:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::bench::block::report::tests::sample;

    #[test]
    fn each_place_has_its_charts_and_each_back_end_its_curves() {
        let mut report = Report::new(&[], Duration::from_secs(1), false).unwrap();
        assert!(draw(&report, io::sink()).is_err());
        for depth in DEPTHS {
            for (place, most) in [(Place::Tmpfs, 800e3), (Place::PageCache, 500e3)] {
                for (peer, share) in [(Peer::Ours, 1.0), (Peer::QsdThreads, 0.25)] {
                    let depth_share = f64::from(depth) / f64::from(depth + 16);
                    let load = Load::random(false, depth, 1);
                    report.add(place, load, peer, sample(most * share * depth_share));
                }
            }
        }
        let mut svg = Vec::new();
        draw(&report, &mut svg).unwrap();
        let svg = String::from_utf8(svg).unwrap();
        assert!(svg.starts_with("<svg"), "{svg}");
        let count = |what: &str| svg.matches(what).count();
        for place in [Place::Tmpfs, Place::PageCache] {
            assert_eq!(count(&format!("{}: ", place.title())), COLUMNS.len());
        }
        assert_eq!(count("disk, O_DIRECT"), 0);
        // A curve in each chart, and a line in the legend.
        assert_eq!(
            count("stroke=\"#D55E00\" stroke-width=\"3\""),
            2 * COLUMNS.len() + 1
        );
        assert_eq!(count("qsd-threads"), 1);
        assert_eq!(count("qsd-io_uring"), 0);
        assert!(svg.contains(&report.date));
    }

    #[test]
    fn an_axis_ends_at_powers_of_two() {
        assert_eq!(octaves([3.0, 100.0].into_iter()), 2.0..128.0);
        assert_eq!(octaves([64.0].into_iter()), 64.0..128.0);
        assert_eq!(octaves([].into_iter()), 1.0..2.0);
    }
}
