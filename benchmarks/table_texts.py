"""What the rows of the table of figures say, in words: what was measured, the figure, the limit or peer beside it.

The names in braces are values of `table_rows.py`.
"""

from __future__ import annotations

ENGLISH_HEAD = "| what | measured | limit or peer beside it | machine |"
CHINESE_HEAD = "| 内容 | 实测 | 旁边的极限或对照 | 机器 |"

ENGLISH: dict[str, tuple[str, str, str]] = {
    "precompute": (
        "precompute end to end, {frames} frames, {image_size} wide",
        "{seconds} s, **{ratio} x**",
        "{limit} s: the encoder alone on the same frames, already decoded",
    ),
    "scaling": (
        "{processes} precompute processes side by side, {frames} frames",
        "**{ratio} x** the speed of one; **{over}** of the limit",
        "{bare} x: the bare encoder in as many processes",
    ),
    "causal": (
        "causal features of a {samples}-step episode",
        "{seconds} s, **{ratio} x**; {shared} passes, {tower} through the patch tower",
        "{limit} s, {passes} passes: every sample frame by frame; ratio of FLOPs {flops}",
    ),
    "causal_efficiency": (
        "the same, beside single frames",
        "{features} features/s, **{share}** of what the FLOPs allow",
        "{limit} features/s, if they ran at the speed of single frames in batches",
    ),
    "planning": (
        "a second, unchanged run, {samples} samples, {images} images",
        "**{seconds} s**, {memory} MB, {opened} images opened",
        "{parse} s to parse the JSON, {stat} s to stat the images",
    ),
    "reading": (
        "batches of {batch_size} features of {record} MB to the training loop, {threads} threads",
        "{delivery} GB/s, **{over}** of the limit; one `get(out=)` {get_into_buffer} GB/s, **{into}**",
        "{pread_threads_checksum} GB/s pread and checksum, {threads} threads; pread alone {pread_1}; "
        "a DataLoader of {threads} workers {dataloader} (**{times} x**)",
    ),
    "cold_throttled": (
        "cold features from disks of {limits} MB/s",
        "{delivery} MB/s, **{over}** of the disk; a loop's step {ahead} x its length",
        "{device} MB/s: long reads; without reading ahead a step takes {needed} x",
    ),
    "cold_latency": (
        "cold features over a mount that answers after {latency} ms",
        "{delivery} MB/s, **{over}** of the mount; a loop's step {ahead} x its length",
        "{device} MB/s: long reads; without reading ahead a step takes {needed} x",
    ),
    "cold_disk": (
        "cold features from the machine's own disk",
        "{delivery} MB/s, **{over}** of the disk; a loop's step {ahead} x its length",
        "{device} MB/s: long reads; without reading ahead a step takes {needed} x",
    ),
    "writing": (
        "writing a shard of {size} MB, codec {codec}, {file_system}",
        "{ours} MB/s, **{over}** of write and fsync",
        "{raw} MB/s: write and fsync of the same bytes, nothing else; {early} MB/s with the same early start",
    ),
    "index": (
        "a cache of {records} records: open it, find one",
        "{open} ms, {lookup} µs, {memory} MB of own memory; a `get` takes **{get} x** of one from {least}",
        "{listing} ms to list the shards; numpy's search {search} µs; a dictionary {dict} µs and {dict_memory} MB",
    ),
    "index_rebuild": (
        "the index made anew, {shards} shards, {records} records",
        "{seconds} s, **{over}** of the limit",
        "{limit} s: every header read and parsed, nothing else",
    ),
    "codec_lossless": (
        "codec `lossless`, features of the encoder {size}",
        "**{ratio}** of the bytes; decoding {lossless_decode} GB/s a core, `get` {get_lossless}",
        "{bound}: entropy of the exponents; zstandard alone {zstd_alone} GB/s, `get` of unpacked features {get_none}",
    ),
    "codec_int8": (
        "`int8`, features of the encoder {size}",
        "**{ratio}** of the bytes, {error} % off, the worst token {worst} %; "
        "decoding {int8_decode} GB/s a core, `get` {get_int8}",
        "copying {copy} GB/s, `get` of unpacked features {get_none}",
    ),
    "loss": (
        "loss of {steps} training steps from features in {dtype}, against float32",
        "{middle} % off in the middle, {largest} % at most, **{end} %** at the end",
        "{other} % at the end: another order of the samples",
    ),
    "startup": (
        "from nothing to the first step, {samples} samples, all in the cache",
        "{start} s, of which **{data} s** are for the data",
        "{parse} s to parse the JSON",
    ),
    "step": (
        "training step from the cache ({size} models, {tokens} tokens, 9 frames)",
        "{cached} s, **{over} x** the step with its features in memory",
        "{resident} s: features in memory; live {live} s, as published {reference} s (**{speedup} x**)",
    ),
    "step_batch": (
        "largest batch of a training step ({size} models)",
        "**{cached}** samples from the cache",
        "{resident}: features in memory; live {live}, as published {reference}",
    ),
    "encoder": (
        "encoder ({size}, {dtype}), {context}, {width} wide",
        "{frames} passes/s, **{share} %** of the peak",
        "{peak} TFLOP/s: the largest matrix product",
    ),
}

CHINESE: dict[str, tuple[str, str, str]] = {
    "precompute": (
        "预计算全程，{frames} 帧，宽 {image_size}",
        "{seconds} s，**{ratio} 倍**",
        "{limit} s：同样的帧已解码，只跑编码器",
    ),
    "scaling": (
        "{processes} 个预计算进程同时运行，{frames} 帧",
        "单进程的 **{ratio} 倍**；极限的 **{over}**",
        "{bare} 倍：同样多的进程只跑编码器",
    ),
    "causal": (
        "{samples} 步 episode 的因果特征",
        "{seconds} s，**{ratio} 倍**；{shared} 次前向，patch tower {tower} 次",
        "{limit} s，{passes} 次前向：每个样本逐帧计算；FLOPs 之比 {flops}",
    ),
    "causal_efficiency": (
        "同上，与单帧相比",
        "{features} 个特征/s，FLOPs 所允许的 **{share}**",
        "{limit} 个特征/s：若以成批单帧的速度计算",
    ),
    "planning": (
        "第二次、未改动的运行，{samples} 个样本，{images} 张图像",
        "**{seconds} s**，{memory} MB，打开 {opened} 张图像",
        "解析 JSON {parse} s，stat 图像 {stat} s",
    ),
    "reading": (
        "把每批 {batch_size} 个 {record} MB 的特征送到训练循环，{threads} 线程",
        "{delivery} GB/s，极限的 **{over}**；单次 `get(out=)` {get_into_buffer} GB/s，**{into}**",
        "{threads} 线程 pread 加校验 {pread_threads_checksum} GB/s；单线程 pread {pread_1}；"
        "{threads} 个 worker 的 DataLoader {dataloader}（**{times} 倍**）",
    ),
    "cold_throttled": (
        "冷特征（不在页缓存中），磁盘限速 {limits} MB/s",
        "{delivery} MB/s，磁盘的 **{over}**；循环一步为其时长的 {ahead} 倍",
        "长读取 {device} MB/s；不预读时一步为 {needed} 倍",
    ),
    "cold_latency": (
        "冷特征，挂载点每个请求 {latency} ms 后应答",
        "{delivery} MB/s，挂载点的 **{over}**；循环一步为其时长的 {ahead} 倍",
        "长读取 {device} MB/s；不预读时一步为 {needed} 倍",
    ),
    "cold_disk": (
        "冷特征，本机磁盘",
        "{delivery} MB/s，磁盘的 **{over}**；循环一步为其时长的 {ahead} 倍",
        "长读取 {device} MB/s；不预读时一步为 {needed} 倍",
    ),
    "writing": (
        "写一个 {size} MB 的 shard，codec {codec}，{file_system}",
        "{ours} MB/s，write 加 fsync 的 **{over}**",
        "{raw} MB/s：同样的字节只做 write 和 fsync；若也让磁盘提前开始则为 {early} MB/s",
    ),
    "index": (
        "{records} 条记录的缓存：打开，查找一条",
        "{open} ms，{lookup} µs，自有内存 {memory} MB；一次 `get` 是 {least} 条时的 **{get} 倍**",
        "列出 shard {listing} ms；numpy 查找 {search} µs；字典 {dict} µs、{dict_memory} MB",
    ),
    "index_rebuild": (
        "重建索引，{shards} 个 shard，{records} 条记录",
        "{seconds} s，极限的 **{over}**",
        "{limit} s：只读取并解析每个文件头",
    ),
    "codec_lossless": (
        "codec `lossless`，编码器 {size} 的特征",
        "字节数的 **{ratio}**；单核解码 {lossless_decode} GB/s，`get` {get_lossless}",
        "{bound}：指数的熵；只用 zstandard {zstd_alone} GB/s，未压缩特征的 `get` {get_none}",
    ),
    "codec_int8": (
        "`int8`，编码器 {size} 的特征",
        "字节数的 **{ratio}**，误差 {error} %，最差 token {worst} %；单核解码 {int8_decode} GB/s，`get` {get_int8}",
        "复制 {copy} GB/s，未压缩特征的 `get` {get_none}",
    ),
    "loss": (
        "用 {dtype} 特征训练 {steps} 步的损失，与 float32 相比",
        "中位数相差 {middle} %，最多 {largest} %，结束时 **{end} %**",
        "{other} %：换一种样本顺序，结束时",
    ),
    "startup": (
        "从启动到第一步，{samples} 个样本，全部在缓存中",
        "{start} s，其中数据占 **{data} s**",
        "解析 JSON {parse} s",
    ),
    "step": (
        "用缓存训练一步（{size} 模型，{tokens} 个 token，9 帧）",
        "{cached} s，是特征已在内存时的 **{over} 倍**",
        "特征已在内存 {resident} s；实时计算 {live} s，原始方式 {reference} s（**{speedup} 倍**）",
    ),
    "step_batch": (
        "训练一步的最大 batch（{size} 模型）",
        "从缓存 **{cached}** 个样本",
        "特征已在内存 {resident}；实时计算 {live}，原始方式 {reference}",
    ),
    "encoder": (
        "编码器（{size}，{dtype}），{context}，宽 {width}",
        "{frames} 次前向/s，峰值的 **{share} %**",
        "{peak} TFLOP/s：最大的矩阵乘法",
    ),
}
