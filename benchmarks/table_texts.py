"""What the rows of the table of figures say, in words: what was measured, the figure, the limit or peer beside it.

They are read by people who have not read the benchmark. The names in braces are values of `table_rows.py`.
"""

from __future__ import annotations

HEADS = {
    "en": ("| what | measured | limit or peer beside it | machine |", "|---|---|---|---|"),
    "zh": ("| 内容 | 实测 | 极限或对照 | 机器 |", "|---|---|---|---|"),
}

ENGLISH: dict[str, tuple[str, str, str]] = {
    "precompute": (
        "precompute from start to end, {frames} frames, {image_size} wide",
        "{seconds} s, **{ratio} x** the encoder's own time",
        "{limit} s: the encoder alone, on the same frames already decoded",
    ),
    "precompute_steady": (
        "the same, from the first batch to the last",
        "{written} features/s, **{share}** of the limit",
        "{limit} features/s: the encoder alone",
    ),
    "scaling": (
        "{processes} precompute processes on one machine, {frames} frames",
        "**{ratio} x** as fast as one process, **{over}** of what is possible",
        "{bare} x: as many processes that run the bare encoder",
    ),
    "causal": (
        "causal features of all steps of a {samples}-step episode",
        "{seconds} s, **{ratio} x** the time of the published way; {shared} frame passes, {tower} of them "
        "through VGGT's "
        "per-image tower",
        "{limit} s, {passes} frame passes: each sample by itself, frame by frame; the arithmetic alone would "
        "give {flops} x",
    ),
    "causal_efficiency": (
        "the same, beside single frames",
        "{features} features/s, **{share}** of what their arithmetic allows",
        "{limit} features/s: the same arithmetic at the speed of single frames in batches",
    ),
    "planning": (
        "precompute started again with nothing to do, {samples} samples of {images} images",
        "**{seconds} s**, {memory} MB of memory, {opened} images opened",
        "{parse} s: parsing the JSON; {stat} s: asking for size and time of each image",
    ),
    "reading": (
        "features in page cache to the training loop, in batches of {batch_size} of {record} MB, by {threads} "
        "threads",
        "{delivery} GB/s, **{over}** of the limit; one `get(out=)` {get_into_buffer} GB/s, **{into}** of `preadv`",
        "{pread_threads_checksum} GB/s: `preadv` and checksum by {threads} threads, nothing else; `preadv` by "
        "one thread "
        "{pread_1}; a DataLoader of {threads} workers {dataloader}, so the cache is **{times} x** as fast",
    ),
    "cold_throttled": (
        "features that are not in page cache, from disks that give {limits} MB/s",
        "{delivery} MB/s, **{over}** of the disk; a training step whose features are read meanwhile takes "
        "{ahead} x the "
        "time of one that reads nothing",
        "{device} MB/s: long plain reads; if features were read only when the step needs them it would take "
        "{needed} x",
    ),
    "cold_latency": (
        "the same over a mount that answers each request after {latency} ms, as a network's might",
        "{delivery} MB/s, **{over}** of the mount; past the page cache, in larger requests, {past} MB/s; a step takes "
        "{ahead} x the time of one that reads nothing",
        "{device} MB/s: long plain reads; if features were read only when the step needs them it would take "
        "{needed} x",
    ),
    "cold_disk": (
        "the same from the machine's own disk",
        "{delivery} MB/s, **{over}** of the disk, at {core} core-seconds a GB; past the page cache {past} MB/s at "
        "**{past_core}**; a step takes {ahead} x the time of one that reads nothing",
        "{device} MB/s: long plain reads; the checksum alone takes {checksum} core-seconds a GB; if features were "
        "read only when the step needs them a step would take {needed} x",
    ),
    "object_store": (
        "features of {record} MB in a bucket of moto's server on the same machine, by {threads} threads",
        "{rate} MB/s, **{over}** of the limit; {core} core-seconds a GB",
        "{limit} MB/s: obstore alone, the same requests; {limit_core} core-seconds a GB",
    ),
    "staging": (
        "an epoch over a cache behind a wire of {wire} MB/s, all of it staged on this machine",
        "**{staged} x** the time without a stage; the epoch before it, which fills the stage, {through} x; with "
        "room for {share} % of the bytes {part} x, {local} % of the reads local",
        "1 x: nothing staged; with that room and LRU {lru} % of the reads would be local",
    ),
    "writing": (
        "writing a shard of {size} MB until it is safe on disk, codec {codec}, {file_system}",
        "{ours} MB/s, **{over} x** the speed of plain `write` and fsync",
        "{raw} MB/s: plain `write` and fsync of the same bytes; {early} MB/s if the disk is asked to begin "
        "early, as it is "
        "here",
    ),
    "writer": (
        "precompute's writer alone, {width} wide, {file_system}",
        "{ours} frames/s, **{over}** of the limit",
        "{limit} frames/s: checksum and write of the same features on one thread",
    ),
    "index": (
        "a cache of {records} features: open it, find one",
        "{open} ms to open, {lookup} µs to find, {memory} MB of memory; reading one takes **{get} x** the time "
        "it takes "
        "in a cache of {least}",
        "{listing} ms: listing the shards; {search} µs: numpy's binary search; a Python dictionary {dict} µs and "
        "{dict_memory} MB",
    ),
    "index_rebuild": (
        "a lost index made again, {shards} shards, {records} features",
        "{seconds} s, **{over}** of the limit's speed",
        "{limit} s: reading and parsing the headers of all shards, nothing else",
    ),
    "codec_lossless": (
        "`--codec lossless`: the same bits in fewer bytes (features of the {size} encoder)",
        "**{ratio}** of the bytes; unpacking {lossless_decode} GB/s a core, a whole `get` {get_lossless}",
        "{bound}: the least that coding the exponents can reach (their entropy); `get` of plain features "
        "{get_none} GB/s; "
        "zstandard alone unpacks {zstd_alone}",
    ),
    "codec_int8": (
        "`--feature_dtype int8`: half the bytes (features of the {size} encoder)",
        "**{ratio}** of the bytes; {error} % off, the worst token {worst} %; unpacking {int8_decode} GB/s a "
        "core, a whole "
        "`get` {get_int8}",
        "`get` of plain features {get_none} GB/s; copying memory {copy}",
    ),
    "loss": (
        "loss over {steps} training steps, features in {dtype} instead of float32",
        "{middle} % apart in the median step, {largest} % at most, **{end} %** at the end",
        "{other} % at the end: float32 again, samples in another order",
    ),
    "startup": (
        "from starting the trainer to its first step, {samples} samples, all in the cache",
        "{start} s, of which **{data} s** go to the data",
        "{parse} s: parsing the JSON, nothing else",
    ),
    "step": (
        "a training step from the cache ({size} models, {tokens} tokens, 9 frames)",
        "{cached} s, **{over} x** the step whose features are already in memory",
        "{resident} s: features already in memory, which no cache can beat; VGGT live in this project {live} s; as "
        "published {reference} s, **{speedup} x** as long",
    ),
    "step_batch": (
        "samples that fit into one training step ({size} models)",
        "**{cached}** from the cache",
        "{resident}: features already in memory; VGGT live {live}; as published {reference}",
    ),
    "encoder": (
        "VGGT's encoder ({size}, {dtype}), {context} context, {width} wide",
        "{frames} frame passes/s, **{share} %** of the device's peak",
        "{peak} TFLOP/s: the largest matrix product",
    ),
}

CHINESE: dict[str, tuple[str, str, str]] = {
    "precompute": (
        "预计算从头到尾，{frames} 帧，宽 {image_size}",
        "{seconds} s，为编码器自身耗时的 **{ratio} 倍**",
        "{limit} s：图像已解码，只跑编码器",
    ),
    "precompute_steady": (
        "同上，从第一批到最后一批",
        "{written} 个特征/s，极限的 **{share}**",
        "{limit} 个特征/s：只跑编码器",
    ),
    "scaling": (
        "一台机器上同时跑 {processes} 个预计算进程，{frames} 帧",
        "速度是单进程的 **{ratio} 倍**，达到理论可得的 **{over}**",
        "{bare} 倍：同样数量的进程只跑编码器",
    ),
    "causal": (
        "{samples} 步 episode 的全部 causal 特征",
        "{seconds} s，为原始做法耗时的 **{ratio} 倍**；单帧前向 {shared} 次，其中经过 patch tower 的 {tower} 次",
        "{limit} s，单帧前向 {passes} 次：每个样本单独逐帧计算；只看运算量应为 {flops} 倍",
    ),
    "causal_efficiency": (
        "同上，与单帧编码相比",
        "每秒 {features} 个特征，为运算量所允许的 **{share}**",
        "每秒 {limit} 个特征：同样的运算量，按成批编码单帧的速度",
    ),
    "planning": (
        "数据没有变化时再次运行预计算，{samples} 个样本，{images} 张图像",
        "**{seconds} s**，内存 {memory} MB，打开图像 {opened} 张",
        "{parse} s：解析 JSON；{stat} s：查询每张图像的大小和时间",
    ),
    "reading": (
        "从页缓存到训练循环，每批 {batch_size} 个 {record} MB 的特征，{threads} 个线程",
        "{delivery} GB/s，达到极限的 **{over}**；单次 `get(out=)` {get_into_buffer} GB/s，为 `preadv` 的 **{into}**",
        "{pread_threads_checksum} GB/s：{threads} 个线程只做 `preadv` 和校验；单线程 `preadv` {pread_1}；"
        "{threads} 个 worker 的 DataLoader {dataloader}，缓存是它的 **{times} 倍**",
    ),
    "cold_throttled": (
        "不在页缓存里的特征，磁盘带宽 {limits} MB/s",
        "{delivery} MB/s，为磁盘的 **{over}**；边算边读时，训练一步的耗时是完全不读盘时的 {ahead} 倍",
        "{device} MB/s：大块顺序读；若等到用时才读，一步的耗时为 {needed} 倍",
    ),
    "cold_latency": (
        "同上，类似网络盘的挂载，每个请求 {latency} ms 后才有应答",
        "{delivery} MB/s，为该挂载的 **{over}**；绕过页缓存、每个请求更大时 {past} MB/s；"
        "训练一步的耗时是完全不读盘时的 {ahead} 倍",
        "{device} MB/s：大块顺序读；若等到用时才读，一步的耗时为 {needed} 倍",
    ),
    "cold_disk": (
        "同上，本机磁盘",
        "{delivery} MB/s，为磁盘的 **{over}**，每 GB 用 {core} 核·秒；"
        "绕过页缓存时 {past} MB/s，每 GB 用 **{past_core}** 核·秒；训练一步的耗时是完全不读盘时的 {ahead} 倍",
        "{device} MB/s：大块顺序读；仅校验就要每 GB {checksum} 核·秒；若等到用时才读，一步的耗时为 {needed} 倍",
    ),
    "object_store": (
        "桶里的特征，每个 {record} MB，{threads} 个线程，同一台机器上的 moto 服务器",
        "{rate} MB/s，达到极限的 **{over}**；每 GB 用 {core} 核秒",
        "{limit} MB/s：只用 obstore，请求相同；每 GB 用 {limit_core} 核秒",
    ),
    "staging": (
        "遍历一个 epoch，缓存在 {wire} MB/s 的网络后面，已全部暂存在本机",
        "耗时为不暂存时的 **{staged} 倍**；此前边读边存的那个 epoch 为 {through} 倍；"
        "只放得下 {share} % 的字节时为 {part} 倍，{local} % 的读取在本机完成",
        "1 倍：不暂存；同样的空间如果用 LRU，本机读取只占 {lru} %",
    ),
    "writing": (
        "写一个 {size} MB 的分片直到落盘，编解码 {codec}，{file_system}",
        "{ours} MB/s，为单纯 `write` 加 fsync 的 **{over} 倍**",
        "{raw} MB/s：同样的字节只做 `write` 和 fsync；像这里一样让磁盘提前开始写，则为 {early} MB/s",
    ),
    "writer": (
        "单独测 precompute 的写入端，宽 {width}，{file_system}",
        "{ours} 帧/秒，极限的 **{over}**",
        "{limit} 帧/秒：一个线程对同样的特征只做校验和与 write",
    ),
    "index": (
        "{records} 个特征的缓存：打开，再查一个",
        "打开 {open} ms，查找 {lookup} µs，内存 {memory} MB；读一个特征的耗时是 {least} 个特征时的 **{get} 倍**",
        "{listing} ms：列出分片；{search} µs：numpy 二分查找；Python 字典 {dict} µs、{dict_memory} MB",
    ),
    "index_rebuild": (
        "索引丢失后重建，{shards} 个分片，{records} 个特征",
        "{seconds} s，速度为极限的 **{over}**",
        "{limit} s：只读取并解析所有分片的文件头",
    ),
    "codec_lossless": (
        "`--codec lossless`：逐位不变，体积更小（{size} 编码器的特征）",
        "体积为原来的 **{ratio}**；单核解码 {lossless_decode} GB/s，完整的 `get` {get_lossless}",
        "{bound}：对指数部分编码的下限（熵）；未压缩特征的 `get` {get_none} GB/s；只用 zstandard 解码 {zstd_alone}",
    ),
    "codec_int8": (
        "`--feature_dtype int8`：体积减半（{size} 编码器的特征）",
        "体积为原来的 **{ratio}**；误差 {error} %，最差的 token {worst} %；单核解码 {int8_decode} GB/s，"
        "完整的 `get` {get_int8}",
        "未压缩特征的 `get` {get_none} GB/s；内存复制 {copy}",
    ),
    "loss": (
        "训练 {steps} 步的损失，特征用 {dtype} 而不是 float32",
        "各步相差的中位数 {middle} %，最大 {largest} %，训练结束时 **{end} %**",
        "{other} %：同为 float32，只换样本顺序，训练结束时",
    ),
    "startup": (
        "从启动训练到第一步，{samples} 个样本，全部在缓存中",
        "{start} s，其中处理数据 **{data} s**",
        "{parse} s：只解析 JSON",
    ),
    "step": (
        "用缓存训练一步（{size} 模型，{tokens} 个 token，9 帧）",
        "{cached} s，是特征已在内存时的 **{over} 倍**",
        "{resident} s：特征已在内存，任何缓存都不可能更快；本项目实时运行 VGGT {live} s；原始做法 {reference} s，"
        "为 **{speedup} 倍**",
    ),
    "step_batch": (
        "一步训练能容纳的样本数（{size} 模型）",
        "用缓存 **{cached}**",
        "{resident}：特征已在内存；实时运行 VGGT {live}；原始做法 {reference}",
    ),
    "encoder": (
        "VGGT 编码器（{size}，{dtype}），{context}，宽 {width}",
        "每秒单帧前向 {frames} 次，达到该设备峰值的 **{share} %**",
        "{peak} TFLOP/s：最大的矩阵乘法",
    ),
}

TEXTS = {"en": ENGLISH, "zh": CHINESE}
